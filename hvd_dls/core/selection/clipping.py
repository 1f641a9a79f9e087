"""Limits of one layer's gradient, by value and by norm, in NumPy."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from hvd_dls.config import DLSConfig
from hvd_dls.core.selection.norms import Norm, l2_norm
from hvd_dls.core.selection.passes_numpy import widened


class Limits(NamedTuple):
    """What clips a gradient, as far as it binds; by value goes first.

    Attributes:
        factor: on all entries, after that; None: 1.
        magnitude: largest of an entry; None: any.
    """

    factor: float | None
    magnitude: float | None

    def clipped(self, block: np.ndarray) -> np.ndarray:
        """Entries of the gradient, clipped, in a dtype that adds."""
        own = widened(block)
        if self.magnitude is not None:
            limit = own.dtype.type(self.magnitude)
            own = np.clip(own, -limit, limit)
        return own if self.factor is None else own * own.dtype.type(self.factor)


def limits_of(
    gradient: np.ndarray, config: DLSConfig, loss_scale: float, known_norm: Norm | None
) -> Limits:
    """The limits of a gradient; none if it is not finite, which is to be found later.

    Args:
        gradient: (n,) of any dtype that ``passes.find`` takes.
        config: the options.
        loss_scale: see ``Correction.apply``.
        known_norm: of the gradient, values clipped, and its limit, instead of the options'.
    """
    if not (config.clip_norm or config.clip_value or known_norm):
        return Limits(None, None)
    limit = None if config.clip_value is None else config.clip_value * loss_scale
    if known_norm is not None:
        norm, longest = known_norm
    else:
        norm = l2_norm(gradient, limit)
        longest = math.inf if config.clip_norm is None else config.clip_norm * loss_scale
    if math.isnan(norm):
        return Limits(None, None)
    return Limits(longest / norm if norm > longest else None, limit)
