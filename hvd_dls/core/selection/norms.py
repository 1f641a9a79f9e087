"""The L2 norm of gradients and residuals."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from hvd_dls.core.selection.passes_numpy import widened

_BLOCK = 1 << 15  # entries worked on at once: all that is touched of them stays in cache


class Norm(NamedTuple):
    """The norm of a layer's gradient, and what it may be.

    Attributes:
        value: L2 norm, as ``Backend.norm`` has it.
        limit: that the gradient is to be scaled down to.
    """

    value: Any
    limit: float


def l2_norm(values: np.ndarray, limit: float | None = None) -> float:
    """In float64, without overflow; NaN if a value is not finite.

    Args:
        values: (n,) of any dtype that ``passes.find`` takes.
        limit: magnitudes above it count as if they were that.
    """
    norm = 0.0
    for start in range(0, len(values), _BLOCK):
        block = np.abs(widened(values[start : start + _BLOCK]).astype(np.float64))
        largest = float(block.max())
        if not math.isfinite(largest):
            return math.nan
        if limit is not None and limit < largest:
            largest = float(limit)
            np.minimum(block, largest, out=block)
        if largest:
            block /= largest
            # Not BLAS, whose threads would be in the way of the model's.
            norm = math.hypot(norm, largest * math.sqrt(np.square(block, out=block).sum()))
    return norm
