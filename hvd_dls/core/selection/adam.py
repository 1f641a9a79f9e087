"""Adam in front of the selection: a rank divides its own momentum, and updates wait.

Behind the exchange, Adam's second moment is quadratic in what arrives, and an entry that has waited
arrives as one late lump, whose step shrinks.  Here the residual holds updates instead, and a plain
sum of them reaches the weights, behind plain SGD.  Measured in docs/adam.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from hvd_dls.config import DLSConfig
from hvd_dls.core.jit import HAVE_NUMBA
from hvd_dls.core.selection import adam_loops, threads
from hvd_dls.core.selection.clipping import limits_of
from hvd_dls.core.selection.norms import Norm

_BLOCK = 1 << 15  # entries worked on at once: all that is touched of them stays in cache


class Moments(NamedTuple):
    """The moments of a layer's gradients, arrays as its backend has them.

    Attributes:
        first: (n,) mean of gradients, multiplied by the loss scale.
        second: (n,) mean of their squares, without it.
    """

    first: Any
    second: Any


class Weights(NamedTuple):
    """What the weights of all gradients in a layer's moments add up to: 1 - beta ** steps.

    Moments are divided by them, as they begin at zero (Adam, arXiv:1412.6980, section 3).
    """

    first: float = 0.0
    second: float = 0.0

    def with_one_more(self, betas: tuple[float, float]) -> Weights:
        """After another gradient."""
        return Weights(*(1 - beta + beta * own for beta, own in zip(betas, self, strict=True)))


class Factors(NamedTuple):
    """The numbers of an update: see ``update_of``."""

    first: float
    of_first: float
    unscale: float
    second: float
    of_second: float
    debias_first: float
    debias_second: float
    epsilon: float
    nothing: float  # zero: times a gradient NaN where that is Inf
    limit: float  # of a gradient's magnitude, so that its square does not overflow


def factors_of(
    config: DLSConfig, weights: Weights, loss_scale: float, dtype: np.dtype[Any]
) -> Factors:
    """The numbers of an update.

    Args:
        config: the options, of which ``adam`` is given.
        weights: with the gradient that is new.
        loss_scale: that it is multiplied by.
        dtype: of the moments.
    """
    assert config.adam is not None
    first, second = config.adam
    largest = float(np.finfo(dtype).max)
    return Factors(
        first,
        1 - first,
        1 / loss_scale,
        second,
        1 - second,
        1 / weights.first,
        1 / weights.second,
        config.adam_eps,
        0.0,
        min(0.9 * math.sqrt(largest) * loss_scale, largest),
    )


def update_of(
    gradient: np.ndarray,
    before: Moments,
    into: Moments,
    update: np.ndarray,
    factors: Factors,
    config: DLSConfig,
    loss_scale: float = 1.0,
    known_norm: Norm | None = None,
) -> None:
    """Clips a gradient, and makes the moments and the update with it, on the host.

    A gradient whose square is too large for its type (1.7e19 in float32) counts as that much: its
    update is as large as Adam's can be, where torch's would be zero from then on.  One that is not
    finite makes an update of NaN: to be found later.

    Args:
        gradient: (n,) of any dtype that ``passes.find`` takes.
        before: the moments without it, of the work dtype.
        into: become the moments with it.
        update: (n,) of the work dtype; becomes what Adam would subtract at a learning rate of 1,
            multiplied by the loss scale.
        factors: see ``factors_of``.
        config: the options, for clipping.
        loss_scale: see ``Correction.apply``.
        known_norm: of the gradient, values clipped, and its limit, instead of the options'.
    """
    own = limits_of(gradient, config, loss_scale, known_norm).clipped(gradient)
    by = np.array(factors, update.dtype)

    def work(part: tuple[int, int]) -> None:
        _one_pass(own, *before, *into, update, by, *part)

    if threads.of_use(len(own)):
        threads.each(work, threads.parts(len(own), _BLOCK))
    else:
        work((0, len(own)))


def _in_blocks(
    gradient: np.ndarray,
    first_before: np.ndarray,
    second_before: np.ndarray,
    first: np.ndarray,
    second: np.ndarray,
    update: np.ndarray,
    by: np.ndarray,
    start: int,
    stop: int,
) -> None:
    """``adam_loops.one_pass`` in NumPy: the same bits."""
    of = Factors(*by)
    with np.errstate(all="ignore"):  # what is not finite is found later
        for begin in range(start, stop, _BLOCK):
            block = slice(begin, min(begin + _BLOCK, stop))
            own, mean, square, out = gradient[block], first[block], second[block], update[block]
            limited = np.minimum(np.maximum(own, -of.limit), of.limit)
            np.multiply(first_before[block], of.first, out=mean)
            mean += limited * of.of_first
            mean += own * of.nothing
            own = limited * of.unscale
            own *= own
            np.multiply(second_before[block], of.second, out=square)
            square += own * of.of_second
            np.multiply(square, of.debias_second, out=out)
            np.sqrt(out, out=out)
            out += of.epsilon
            np.divide(mean * of.debias_first, out, out=out)


_one_pass: Callable[..., None] = adam_loops.one_pass if HAVE_NUMBA else _in_blocks
