"""What a gradient becomes before it enters the residual: clipping, momentum (DGC 3.2, 3.3), Adam.

With momentum in the optimizer, an entry that waits in the residual for T steps arrives without the
momentum it would have gathered.  So each rank keeps a velocity of its own gradients and accumulates
that, and the optimizer adds plain sums: a change of order, exact while everything is sent.  With
Adam a rank's own updates accumulate: see ``adam``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from hvd_dls.config import DLSConfig
from hvd_dls.core.balancing.layers import LayerSpec
from hvd_dls.core.selection.adam import Moments, Weights, factors_of
from hvd_dls.core.selection.backend import HOST, Array, Backend
from hvd_dls.core.selection.norms import Norm, l2_norm
from hvd_dls.core.selection.proposals import Proposals
from hvd_dls.core.selection.usual_shares import UsualShares


class Correction:
    """Clipping and momentum, or Adam, of one model's layers, on one rank.

    As a step is a transaction, velocities change when it ends: ``apply`` proposes, ``commit`` does.

    Args:
        layers: all, compressed or not: momentum must be the same for all parameters.
        config: the options.
        backends: where arrays of layers are that are not on the host, by name.
        own: those that have a velocity on this rank; None: all.

    Attributes:
        active: whether gradients change at all.
        velocities: (n,) of each own layer, by name, in its work dtype; with Adam its first moments;
            empty without momentum and Adam.
        second_moments: Adam's, likewise, without the loss scale; empty without it.
        weights: of the gradients in each own layer's moments, likewise.
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
        self.active = bool(config.momentum or config.adam or limits)
        self.shares: UsualShares | None = None
        if config.clip_global_norm is not None:
            self.shares = UsualShares(config.clip_global_norm)
        self._config = config
        self._layers = {layer.name: layer for layer in layers}
        self._backends = dict.fromkeys(self._layers, HOST) | dict(backends or {})
        names = [layer.name for layer in (layers if own is None else own)]
        moving = names if config.momentum or config.adam else []
        self._velocities = Proposals(moving, self._zeros)
        self._second_moments = Proposals(names if config.adam else [], self._zeros)
        self._updates = Proposals([], self._zeros)
        self.weights = {name: Weights() for name in self._second_moments.now}
        self._proposed_weights: dict[str, Weights] = {}

    def _zeros(self, name: str) -> Array:
        layer = self._layers[name]
        return self._backends[name].zeros(layer.size, layer.work_dtype)

    @property
    def velocities(self) -> dict[str, Array]:
        """See above."""
        return self._velocities.now

    @property
    def second_moments(self) -> dict[str, Array]:
        """See above."""
        return self._second_moments.now

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
        backend, into = self._backends[name], self._velocities.propose(name)
        norm = None
        if self.shares is not None and not limited:
            norm = self._norm_of(name, gradient, loss_scale)
        if self._config.adam is None:
            velocity = self.velocities.get(name)
            return backend.correct(gradient, velocity, into, self._config, loss_scale, norm)
        update = self._updates.propose(name)
        before = Moments(self.velocities[name], self.second_moments[name])
        then = Moments(into, self._second_moments.propose(name))
        weights = self.weights[name].with_one_more(self._config.adam)
        self._proposed_weights[name] = weights
        by = factors_of(self._config, weights, loss_scale, self._layers[name].work_dtype)
        backend.update(gradient, before, then, update, by, self._config, loss_scale, norm)
        return update

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
        """Takes over what was proposed.

        Args:
            sent: indices of the entries that this rank sent of each compressed layer, by name.
        """
        self._velocities.commit()
        self._second_moments.commit()
        self._updates.commit()
        self.weights |= self._proposed_weights
        self._proposed_weights = {}
        if self._config.momentum and self._config.momentum_masking:
            for name in sent.keys() & self.velocities.keys():
                self._backends[name].clear(self.velocities[name], sent[name])
        if self.shares is not None:
            self.shares.commit()

    def forget(self) -> None:
        """Leaves all as it was before the step."""
        self._velocities.forget()
        self._second_moments.forget()
        self._updates.forget()
        self._proposed_weights = {}
        if self.shares is not None:
            self.shares.forget()
