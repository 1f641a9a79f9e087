"""What becomes of a gradient before it enters the residual: clipping, and momentum (DGC 3.2, 3.3).

With momentum in the optimizer, an entry that waits in the residual for T steps arrives without the
momentum it would have gathered.  So each rank keeps a velocity of its own gradients and accumulates
that, and the optimizer adds plain sums: a change of order, exact while everything is sent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from hvd_dls.config import DLSConfig
from hvd_dls.core.balancing.layers import LayerSpec
from hvd_dls.core.selection.backend import HOST, Array, Backend
from hvd_dls.core.selection.norms import Norm, l2_norm
from hvd_dls.core.selection.usual_shares import UsualShares


class Correction:
    """Clipping and momentum of one model's layers, on one rank.

    As a step is a transaction, velocities change when it ends: ``apply`` proposes, ``commit`` does.

    Args:
        layers: all, compressed or not: momentum must be the same for all parameters.
        config: the options.
        backends: where arrays of layers are that are not on the host, by name.
        own: those that have a velocity on this rank; None: all.

    Attributes:
        active: whether gradients change at all.
        velocities: (n,) of each own layer, by name, in its work dtype; empty without momentum.
        shares: of the global norm, which each layer usually has; None without such a limit.
    """

    def __init__(
        self,
        layers: Sequence[LayerSpec],
        config: DLSConfig,
        backends: Mapping[str, Backend] | None = None,
        own: Sequence[LayerSpec] | None = None,
    ) -> None:
        limits = config.clip_norm or config.clip_value or config.clip_global_norm
        self.active = bool(config.momentum or limits)
        self.shares: UsualShares | None = None
        if config.clip_global_norm is not None:
            self.shares = UsualShares(config.clip_global_norm)
        self._config = config
        self._layers = {layer.name: layer for layer in layers}
        self._backends = dict.fromkeys(self._layers, HOST) | dict(backends or {})
        with_velocity = (layers if own is None else own) if config.momentum else []
        self.velocities: dict[str, Array] = {
            x.name: self._backends[x.name].zeros(x.size, x.work_dtype) for x in with_velocity
        }
        self._proposed: dict[str, Array] = {}
        self._spare: dict[str, Array] = {}  # memory of the velocities of the step before

    def apply(
        self, name: str, gradient: Array, loss_scale: float = 1.0, limited: bool = False
    ) -> Array:
        """What enters the residual instead of a gradient.

        Args:
            name: of the layer.
            gradient: (n,) of any dtype that ``passes.find`` takes, where its backend has it.
            loss_scale: that the gradient is multiplied by; limits are for what it would be without.
            limited: whether it is an average of gradients that ranks have multiplied by their own
                ``factor`` each.

        Returns:
            (n,) of the work dtype; not to be changed, and gone with the next step.
        """
        layer, backend = self._layers[name], self._backends[name]
        into = self._spare.pop(name, None)
        if into is None:
            into = backend.zeros(layer.size, layer.work_dtype)
        self._proposed[name] = into
        norm = None
        if self.shares is not None and not limited:
            norm = self._norm_of(name, gradient, loss_scale)
        velocity = self.velocities.get(name)
        return backend.correct(gradient, velocity, into, self._config, loss_scale, norm)

    def factor(self, name: str, gradient: np.ndarray, loss_scale: float = 1.0) -> float:
        """What to multiply this rank's gradient by before ranks average theirs; else ``apply``.

        Other limits hold for the average.

        Args:
            name: of the layer.
            gradient: (n,) on the host, of any dtype that ``passes.find`` takes.
            loss_scale: as in ``apply``.
        """
        if self.shares is None:
            return 1.0
        norm, limit = l2_norm(gradient), self.shares.limit_of(name) * loss_scale
        self.shares.note(name, norm)
        return limit / norm if norm > limit else 1.0  # also if it is NaN

    def _norm_of(self, name: str, gradient: Array, loss_scale: float) -> Norm:
        """A gradient's norm, which is noted for its share of the global one, and all limits."""
        assert self.shares is not None
        value, most = self._config.clip_value, math.inf
        norm = self._backends[name].norm(gradient, None if value is None else value * loss_scale)
        if self._config.clip_norm is not None:
            most = self._config.clip_norm * loss_scale
        self.shares.note(name, norm, most)
        return Norm(norm, min(most, self.shares.limit_of(name) * loss_scale))

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
                self._backends[name].clear(proposed, sent[name])
        self._proposed = {}
        if self.shares is not None:
            self.shares.commit()

    def forget(self) -> None:
        """Leaves the velocities as they were before the step."""
        self._spare |= self._proposed
        self._proposed = {}
        if self.shares is not None:
            self.shares.forget()
