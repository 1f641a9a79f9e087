"""Error feedback and selection: accumulate the gradient, take the k largest, clear them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

_BLOCK = 1 << 16  # entries worked on at once: residual, gradient and scratch stay in cache
_MARGIN = 0.7  # part of the last threshold above which candidates are looked for


class Selection(NamedTuple):
    """What leaves a layer in one step."""

    indices: np.ndarray  # (k,) int64, ascending
    values: np.ndarray  # (k,) of the residual's dtype
    threshold: float  # smallest magnitude among the values


def all_finite(gradient: np.ndarray) -> bool:
    """Whether a gradient holds neither NaN nor Inf.

    A sum is finite only if all terms are, and costs one pass; only a sum that is not (which may
    also be an overflow) is looked into.
    """
    with np.errstate(all="ignore"):
        total = gradient.sum(dtype=max(gradient.dtype, np.dtype(np.float32)))
    return bool(np.isfinite(total)) or bool(np.isfinite(gradient).all())


def accumulate_and_select(
    residual: np.ndarray, gradient: np.ndarray, k: int, last_threshold: float = 0.0
) -> Selection:
    """Adds the gradient to the residual and takes the k entries of largest magnitude out of it.

    Ties go to the lower index.  Exact and deterministic: ``last_threshold`` changes the speed, not
    the result.

    Args:
        residual: (n,) float32 or float64, changed in place: residual + gradient, zero where sent.
        gradient: (n,) finite, of a dtype that adds to the residual's without loss.
        k: 1 <= k <= n.
        last_threshold: of this layer's last step, 0 if unknown.

    Returns:
        The k entries; they and the residual together are residual + gradient, exactly.
    """
    if k == len(residual):
        np.add(residual, gradient, out=residual)
        indices = np.arange(k)
        threshold = float(np.abs(residual).min())
    else:
        candidates, magnitudes = _accumulate(residual, gradient, _MARGIN * last_threshold)
        if len(candidates) < k:
            candidates, magnitudes = np.arange(len(residual)), np.abs(residual)
        chosen, threshold = _largest(magnitudes, k)
        indices = candidates[chosen]
    values = residual[indices]
    residual[indices] = 0
    return Selection(indices, values, threshold)


def _accumulate(
    residual: np.ndarray, gradient: np.ndarray, bound: float
) -> tuple[np.ndarray, np.ndarray]:
    """One pass: residual += gradient, and the indices and magnitudes of what reaches the bound."""
    if bound <= 0:  # everything would
        np.add(residual, gradient, out=residual)
        return np.arange(len(residual)), np.abs(residual)
    indices, magnitudes = [], []
    scratch = np.empty(min(_BLOCK, len(residual)), residual.dtype)
    for start in range(0, len(residual), _BLOCK):
        block = residual[start : start + _BLOCK]
        np.add(block, gradient[start : start + _BLOCK], out=block)
        magnitude = np.abs(block, out=scratch[: len(block)])
        hits = np.flatnonzero(magnitude >= bound)
        indices.append(hits + start)
        magnitudes.append(magnitude[hits])
    return np.concatenate(indices), np.concatenate(magnitudes)


def _largest(magnitudes: np.ndarray, k: int) -> tuple[np.ndarray, float]:
    """Ascending positions of the k largest, ties to the lower index, and the smallest of them."""
    threshold = np.partition(magnitudes, len(magnitudes) - k)[len(magnitudes) - k]
    chosen = magnitudes > threshold
    ties = np.flatnonzero(magnitudes == threshold)
    chosen[ties[: k - np.count_nonzero(chosen)]] = True
    return np.flatnonzero(chosen), float(threshold)
