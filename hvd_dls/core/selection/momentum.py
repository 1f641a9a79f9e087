"""Clipping and momentum of one layer's gradient, in NumPy: see ``correction``."""

from __future__ import annotations

import numpy as np

from hvd_dls.config import DLSConfig
from hvd_dls.core.selection.clipping import limits_of
from hvd_dls.core.selection.norms import Norm

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
    limits = limits_of(gradient, config, loss_scale, known_norm)
    momentum = into.dtype.type(config.momentum)
    ahead = np.empty_like(into) if config.nesterov else None
    with np.errstate(all="ignore"):  # what is not finite is found later
        for start in range(0, len(gradient), _BLOCK):
            block = slice(start, start + _BLOCK)
            own = limits.clipped(gradient[block])
            if velocity is None:
                into[block] = own
                continue
            np.multiply(velocity[block], momentum, out=into[block])
            into[block] += own
            if ahead is not None:  # as torch.optim.SGD
                np.multiply(into[block], momentum, out=ahead[block])
                ahead[block] += own
    return into if ahead is None else ahead
