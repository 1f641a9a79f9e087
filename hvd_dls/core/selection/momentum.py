"""Clipping and momentum of one layer's gradient, in NumPy: see ``correction``."""

from __future__ import annotations

import math

import numpy as np

from hvd_dls.config import DLSConfig
from hvd_dls.core.selection.norms import Norm, l2_norm
from hvd_dls.core.selection.passes_numpy import widened

_BLOCK = 1 << 15  # entries worked on at once: all that is touched of them stays in cache


def correct(
    gradient: np.ndarray,
    velocity: np.ndarray | None,
    into: np.ndarray,
    config: DLSConfig,
    loss_scale: float = 1.0,
    known_norm: Norm | None = None,
) -> np.ndarray:
    """Clips a gradient and adds it to the velocity, on the host.

    Args:
        gradient: (n,) of any dtype that ``passes.find`` takes.
        velocity: (n,) of the work dtype; None without momentum.
        into: (n,) of the work dtype; becomes the new velocity, or the clipped gradient.
        config: the options.
        loss_scale: see ``Correction.apply``.
        known_norm: of the gradient, values clipped, and its limit, instead of the options'.

    Returns:
        What enters the residual: ``into``, or with Nesterov's momentum an array of its own.
    """
    dtype = into.dtype.type
    factor, limit = _limits(gradient, config, loss_scale, known_norm)
    momentum = dtype(config.momentum)
    ahead = np.empty_like(into) if config.nesterov else None
    with np.errstate(all="ignore"):  # what is not finite is found later
        for start in range(0, len(gradient), _BLOCK):
            block = slice(start, start + _BLOCK)
            own = widened(gradient[block])
            if limit is not None:
                own = np.clip(own, -dtype(limit), dtype(limit))
            if factor is not None:
                own = own * dtype(factor)
            if velocity is None:
                into[block] = own
                continue
            np.multiply(velocity[block], momentum, out=into[block])
            into[block] += own
            if ahead is not None:  # as torch.optim.SGD
                np.multiply(into[block], momentum, out=ahead[block])
                ahead[block] += own
    return into if ahead is None else ahead


def _limits(
    gradient: np.ndarray, config: DLSConfig, loss_scale: float, known_norm: Norm | None
) -> tuple[float | None, float | None]:
    """A factor for the norm and a limit for the magnitudes, as far as they bind.

    By value goes first.  What is not finite stays as it is, to be found.
    """
    if not (config.clip_norm or config.clip_value or known_norm):
        return None, None
    limit = None if config.clip_value is None else config.clip_value * loss_scale
    if known_norm is not None:
        norm, longest = known_norm
    else:
        norm = l2_norm(gradient, limit)
        longest = math.inf if config.clip_norm is None else config.clip_norm * loss_scale
    if math.isnan(norm):
        return None, None
    return (longest / norm if norm > longest else None), limit
