"""What becomes of a gradient before it enters the residual: clipping, and momentum (DGC 3.2, 3.3).

With momentum in the optimizer, an entry that waits in the residual for T steps arrives without the
momentum it would have gathered.  So each rank keeps a velocity of its own gradients and accumulates
that, and the optimizer adds plain sums: a change of order, exact while everything is sent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from hvd_dls.config import DLSConfig
from hvd_dls.core.layers import LayerSpec
from hvd_dls.core.norms import l2_norm
from hvd_dls.core.passes_numpy import widened

_BLOCK = 1 << 15  # entries worked on at once: all that is touched of them stays in cache


class Correction:
    """Clipping and momentum of one model's layers, on one rank.

    As a step is a transaction, velocities change when it ends: ``apply`` proposes, ``commit`` does.

    Args:
        layers: all, compressed or not: momentum must be the same for all parameters.
        config: the options.

    Attributes:
        active: whether gradients change at all.
        velocities: (n,) of each layer, by name, in its work dtype; empty without momentum.
    """

    def __init__(self, layers: Sequence[LayerSpec], config: DLSConfig) -> None:
        self.active = bool(config.momentum or config.clip_norm or config.clip_value)
        self._config = config
        self._layers = {layer.name: layer for layer in layers}
        with_velocity = self._layers if config.momentum else {}
        self.velocities = {n: np.zeros(x.size, x.work_dtype) for n, x in with_velocity.items()}
        self._proposed: dict[str, np.ndarray] = {}
        self._spare: dict[str, np.ndarray] = {}  # memory of the velocities of the step before

    def apply(self, name: str, gradient: np.ndarray, loss_scale: float = 1.0) -> np.ndarray:
        """What enters the residual instead of a gradient.

        Args:
            name: of the layer.
            gradient: (n,) of any dtype that ``passes.find`` takes.
            loss_scale: that the gradient is multiplied by; limits are for what it would be without.

        Returns:
            (n,) of the work dtype; not to be changed, and gone with the next step.
        """
        config, layer = self._config, self._layers[name]
        dtype = layer.work_dtype.type
        factor, limit = self._limits(gradient, loss_scale)
        result = self._spare.pop(name, None)
        if result is None:
            result = np.empty(layer.size, layer.work_dtype)
        momentum, velocity = dtype(config.momentum), self.velocities.get(name)
        ahead = np.empty_like(result) if config.nesterov else None
        with np.errstate(all="ignore"):  # what is not finite is found later
            for start in range(0, layer.size, _BLOCK):
                block = slice(start, start + _BLOCK)
                own = widened(gradient[block])
                if limit is not None:
                    own = np.clip(own, -dtype(limit), dtype(limit))
                if factor is not None:
                    own = own * dtype(factor)
                if velocity is None:
                    result[block] = own
                    continue
                np.multiply(velocity[block], momentum, out=result[block])
                result[block] += own
                if ahead is not None:  # as torch.optim.SGD
                    np.multiply(result[block], momentum, out=ahead[block])
                    ahead[block] += own
        self._proposed[name] = result
        return result if ahead is None else ahead

    def _limits(self, gradient: np.ndarray, loss_scale: float) -> tuple[float | None, float | None]:
        """A factor for the norm and a limit for the magnitudes, as far as they bind.

        By value goes first.  What is not finite stays as it is, to be found.
        """
        config = self._config
        if not (config.clip_norm or config.clip_value):
            return None, None
        limit = None if config.clip_value is None else config.clip_value * loss_scale
        norm = l2_norm(gradient, limit)
        if math.isnan(norm):
            return None, None
        if config.clip_norm is None or norm <= config.clip_norm * loss_scale:
            return None, limit
        return config.clip_norm * loss_scale / norm, limit

    def commit(self, sent: dict[str, np.ndarray]) -> None:
        """Takes the proposed velocities over.

        Args:
            sent: indices of the entries that this rank sent of each compressed layer, by name.
        """
        for name, proposed in self._proposed.items():
            if name not in self.velocities:
                self._spare[name] = proposed
                continue
            self._spare[name], self.velocities[name] = self.velocities[name], proposed
            if self._config.momentum_masking and name in sent:
                proposed[sent[name]] = 0
        self._proposed = {}

    def forget(self) -> None:
        """Leaves the velocities as they were before the step."""
        self._spare |= self._proposed
        self._proposed = {}
