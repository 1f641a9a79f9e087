"""Shapes of a gradient's distribution, each of unit variance and symmetric about zero.

A shape is known here by its two-sided survival function S(x) = P(|X| > x) and its inverse.
A layer with standard deviation sigma that sends all entries above t sends the ratio S(t / sigma)
(the paper's appendix E: gradients follow A(0, sigma^2)).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist


@dataclass(frozen=True)
class Tail:
    """One shape: ``survival(x)`` for x >= 0 and ``inverse(ratio)`` for ratio in (0, 1]."""

    survival: Callable[[float], float]
    inverse: Callable[[float], float]


def gaussian() -> Tail:
    """Normal distribution: S(x) = erfc(x / sqrt 2)."""
    return Tail(
        survival=lambda x: math.erfc(x / math.sqrt(2)),
        inverse=lambda ratio: 0.0 if ratio >= 1 else -NormalDist().inv_cdf(ratio / 2),
    )


def weibull(beta: float) -> Tail:
    """Symmetric Weibull: S(x) = exp(-(c x)^beta); beta = 1 is Laplace, smaller is heavier."""
    c = math.sqrt(math.gamma(1 + 2 / beta))
    return Tail(
        survival=lambda x: math.exp(-((c * x) ** beta)),
        inverse=lambda ratio: (-math.log(ratio)) ** (1 / beta) / c,
    )


def pareto(xi: float) -> Tail:
    """Double generalised Pareto, 0 < xi < 1/2: a power-law tail; larger xi is heavier."""
    c = math.sqrt(2 / ((1 - xi) * (1 - 2 * xi)))
    return Tail(
        survival=lambda x: (1 + xi * c * x) ** (-1 / xi),
        inverse=lambda ratio: math.expm1(-xi * math.log(ratio)) / (xi * c),
    )


TAILS = {
    "gaussian": gaussian(),
    "laplace": weibull(1.0),
    "weibull": weibull(0.7),
    "pareto": pareto(0.25),
}
