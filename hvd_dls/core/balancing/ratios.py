"""From variances to ratios, and from ratios to whole numbers of entries."""

from __future__ import annotations

import math

import numpy as np

from hvd_dls.core.balancing.tails import Tail
from hvd_dls.errors import DLSError

_NEARLY = 1e-3  # of an entry: as good as exact for sharing out whole ones
_BISECTIONS = 100  # halves a bracket of any two doubles down to neighbouring numbers


def common_threshold_ratios(
    sizes: np.ndarray, sigmas: np.ndarray, density: float, tail: Tail
) -> np.ndarray:
    """Ratios with which all layers share one threshold t: alpha_l = S(t / sigma_l).

    Solves sum n_l S(t / sigma_l) = density * N by bisection in ln t, inside the exact bracket
    [sigma_min S^-1(rho'), sigma_max S^-1(rho')].  Layers with sigma = 0 get what the others
    cannot hold.

    Args:
        sizes: (L,) entries n_l of each layer.
        sigmas: (L,) standard deviations, >= 0, in any common unit.
        density: in (0, 1].
        tail: shape of the gradients' distribution.

    Returns:
        (L,) float64 in [0, 1] with sum(sizes * ratios) = density * sum(sizes) to rounding.

    Raises:
        DLSError: a sigma is negative or not finite.
    """
    sizes = np.asarray(sizes, dtype=np.float64)
    sigmas = np.asarray(sigmas, dtype=np.float64)
    if not np.all(np.isfinite(sigmas) & (sigmas >= 0)):
        raise DLSError(f"standard deviations must be finite and >= 0, not {sigmas.tolist()}")
    budget = density * sizes.sum()
    live = sigmas > 0
    capacity = sizes[live].sum()
    ratios = np.zeros_like(sizes)
    if capacity <= budget:
        ratios[live] = 1.0
        if capacity < sizes.sum():
            ratios[~live] = (budget - capacity) / sizes[~live].sum()
        return ratios
    n, sigma = sizes[live], sigmas[live]
    quantile = tail.inverse(budget / capacity)
    low, high = math.log(sigma.min() * quantile), math.log(sigma.max() * quantile)

    def at(log_t: float) -> np.ndarray:
        return np.array([tail.survival(math.exp(log_t) / s) for s in sigma])

    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        if n @ at(middle) > budget:
            low = middle
        else:
            high = middle
    ratios[live] = at((low + high) / 2)
    return ratios


def apportion(wanted: np.ndarray, total: int, least: np.ndarray, most: np.ndarray) -> np.ndarray:
    """Whole numbers in [least, most], proportional to ``wanted``, that sum to ``total`` exactly.

    Where limits bind, the others are scaled together; fractions go by largest remainder, ties by
    index.  Only IEEE basic operations and integers: the same on every machine.

    Args:
        wanted: (L,) real numbers >= 0.
        total: K.
        least: (L,) integer lower limits.
        most: (L,) integer upper limits.

    Returns:
        (L,) int64.

    Raises:
        DLSError: the limits cannot hold the total.
    """
    least = np.asarray(least, dtype=np.int64)
    most = np.asarray(most, dtype=np.int64)
    if not least.sum() <= total <= most.sum():
        raise DLSError(
            f"{total} entries cannot be shared among {len(least)} layers that take at least "
            f"{least.sum()} and at most {most.sum()} together"
        )
    if not len(least):
        return least
    # A layer that wants nothing may still have to take what the others cannot hold.
    wanted = np.maximum(np.asarray(wanted, dtype=np.float64), 1e-12 * most)
    lowest, highest = least.astype(np.float64), most.astype(np.float64)  # exact; a mix is slow

    def scaled(factor: float) -> np.ndarray:
        limited: np.ndarray = np.minimum(np.maximum(wanted * factor, lowest), highest)
        return limited

    low, high = 0.0, 1.0
    while _sum(scaled(high)) < total:
        low, high = high, high * 2
    for _ in range(_BISECTIONS):
        if _sum(scaled(high)) - total < _NEARLY:
            break
        middle = (low + high) / 2
        if _sum(scaled(middle)) < total:
            low = middle
        else:
            high = middle
    shares = scaled(high)
    k: np.ndarray = np.floor(shares).astype(np.int64)
    by_remainder = np.argsort(k - shares, kind="stable")
    missing = int(total - k.sum())
    while missing:
        step = 1 if missing > 0 else -1
        room = k < most if step > 0 else k > least
        order = by_remainder if step > 0 else by_remainder[::-1]
        chosen = order[room[order]][: abs(missing)]
        k[chosen] += step
        missing -= step * len(chosen)
    return k


def _sum(values: np.ndarray) -> float:
    """Adds strictly from first to last: np.sum's order may differ between processors."""
    return float(np.cumsum(values)[-1])
