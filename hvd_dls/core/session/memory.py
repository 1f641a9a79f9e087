"""What a rank remembers of a model between steps: all that is saved and restored."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from hvd_dls.config import SPARSE_ALLREDUCE, DLSConfig
from hvd_dls.core.balancing.controller import Controller
from hvd_dls.core.balancing.layers import LayerSpec
from hvd_dls.core.balancing.plan import Plan, initial_k
from hvd_dls.core.checkpoint.redistribution import MOVED
from hvd_dls.core.selection.adam import Weights
from hvd_dls.core.selection.backend import HOST, Array, Backend
from hvd_dls.core.selection.correction import Correction
from hvd_dls.core.session.baselines import BASELINES, BaselineStrategy
from hvd_dls.core.session.fitting import fitted
from hvd_dls.core.session.groups import Groups
from hvd_dls.core.session.owners import KeptPiece, Owners
from hvd_dls.core.session.routing import Routing
from hvd_dls.core.session.state import STATE_VERSION, check_state, damage_named
from hvd_dls.core.wire.dealing import places_of
from hvd_dls.errors import DLSError, StateMismatchError


class Memory:
    """Residuals, velocities, thresholds and ratios of one model.

    Args:
        plan: the layers and their budget.
        config: the options.
        groups: the ranks.
        routing: the buckets.
        norms: Frobenius norm of each layer's weights, for prior="weight_norm".
        backends: where arrays of layers are that are not on the host, by name.

    Attributes:
        layers: that are compressed, in model order.
        controller: what all ranks agree on.
        baseline: what this rank chooses itself, by strategies that do; or None.
        correction: clipping and momentum.
        residuals: (n,) of each compressed layer that this rank sends, by name.
        leftovers: (n,) residuals of layers that this rank sent once, and that go dense or are
            another's to send now, by name: each is added to its layer's next gradient.
        thresholds: of the last step, by name; 0 before.
        loss_scale: what residuals and velocities are multiplied by.
        backends: of all layers, by name.
        averages: whether Horovod divides sums over ranks by their number.
        owners: who owns what, with exchange="sparse_allreduce"; else None.
    """

    def __init__(
        self,
        plan: Plan,
        config: DLSConfig,
        groups: Groups,
        routing: Routing,
        norms: Mapping[str, float] | None,
        backends: Mapping[str, Backend] | None,
    ) -> None:
        self.plan, self.config, self.groups = plan, config, groups
        self.averages = True
        self._rows = routing.rows
        self.layers = plan.sparse
        self.backends = dict.fromkeys((x.name for x in plan.layers), HOST) | dict(backends or {})
        self.controller = Controller(plan, config, initial_k(plan, config, norms), routing.rows)
        self.baseline = BaselineStrategy(plan, config) if config.strategy in BASELINES else None
        own = [x for x in plan.layers if x.name in routing.owned]
        dense = [layer for layer, _ in plan.dense]
        self.correction = Correction(plan.layers, config, self.backends, [*own, *dense])
        self.residuals: dict[str, Array] = {
            x.name: self.backends[x.name].zeros(x.size, x.work_dtype) for x in own
        }
        self.leftovers: dict[str, Array] = {}
        self.thresholds = {x.name: 0.0 for x in plan.sparse}
        self.loss_scale = 1.0
        self.owners: Owners | None = None
        if config.exchange == SPARSE_ALLREDUCE and groups.count > 1:
            self.owners = Owners(routing.buckets, groups.count, groups.own, routing.sends)

    def scale_to(self, loss_scale: float) -> None:
        """Has residuals and velocities follow the loss scale: exactly, by powers of two.

        Raises:
            DLSError: it is not a finite number > 0.
        """
        if not (math.isfinite(loss_scale) and loss_scale > 0):
            raise DLSError(f"loss_scale={loss_scale!r}: accepted is a finite number > 0")
        factor = loss_scale / self.loss_scale
        for arrays in (self.residuals, self.leftovers, self.correction.velocities):
            for name, array in arrays.items():
                self.backends[name].scale(array, factor)
        self.thresholds = {name: factor * value for name, value in self.thresholds.items()}
        if self.owners is not None:
            self.owners.scale(factor)
        if self.baseline is not None:
            self.baseline.scale(factor)
        self.loss_scale = loss_scale

    def agree(self, agreed: np.ndarray) -> None:
        """Takes over another rank's ``agreed()``."""
        self.controller.restore(agreed)
        self._start_baseline()

    def agreed(self) -> np.ndarray:
        """What all ranks go by, int64: the ratios."""
        return self.controller.state()

    def _start_baseline(self) -> None:
        if self.baseline is not None:
            self.baseline.start_step(self.controller.density, self.controller.attendance)

    def inherit(self, other: Memory, factor: float = 1.0) -> None:
        """Takes over what was remembered of the same model: by other ranks, or in another type.

        Args:
            other: with the same names of layers.
            factor: on residuals: number of senders now over that before, where sums over senders
                are divided by it, so that what waits weighs as much as it did.  What goes dense
                is divided by the number of ranks, also where fewer send.
        """
        self.loss_scale = other.loss_scale
        waiting = other.residuals | other.leftovers
        if other.owners is not None:
            waiting = self._take_kept(other, dict(waiting), factor)
        for name, array in waiting.items():
            backend = self.backends[name]
            own = self.residuals.get(name)
            if own is None:
                layer = next(x for x in self.plan.layers if x.name == name)
                self._check_leftover(layer)
                own = self.leftovers[name] = backend.zeros(layer.size, layer.work_dtype)
            backend.load(own, other.backends[name].to_host(array))
            backend.scale(own, factor * self._senders_for(name) / other._senders_for(name))
        self._inherit_moments(other)
        if self.correction.shares is not None and other.correction.shares is not None:
            self.correction.shares.load(other.correction.shares.squares)
        for name in self.thresholds:
            self.thresholds[name] = factor * other.thresholds.get(name, 0.0)
        if [x.name for x in self.layers] == [x.name for x in other.layers]:
            self.controller.restore(other.controller.state())
            if self.baseline is not None and other.baseline is not None:
                self.baseline.norms = dict(other.baseline.norms)
        else:
            self.controller.start_at(other.controller.step)
        self._start_baseline()

    def _inherit_moments(self, other: Memory) -> None:
        """Velocities, or Adam's moments, of layers that had some."""
        own, theirs = self.correction, other.correction
        for arrays, before in (
            (own.velocities, theirs.velocities),
            (own.second_moments, theirs.second_moments),
        ):
            for name in arrays.keys() & before.keys():
                array = other.backends[name].to_host(before[name])
                self.backends[name].load(arrays[name], array)
        own.weights |= {name: theirs.weights[name] for name in own.weights.keys() & theirs.weights}

    def _check_leftover(self, layer: LayerSpec) -> None:
        """Refuses a residual that would be added to the gradient of what another rank sends.

        Raises:
            DLSError: it holds Adam's updates, which are no gradients.
        """
        if self.config.adam and layer in self.plan.sparse:
            raise DLSError(
                f"adam={self.config.adam}: layer {layer.name!r} is sent by another rank of this "
                "host than before, but what waits in its residual are updates, and cannot be "
                "added to gradients. When ranks or hosts change, save a checkpoint before and "
                "load it in a new process: see docs/checkpoints.md"
            )

    def _take_kept(
        self, other: Memory, waiting: dict[str, Array], factor: float
    ) -> dict[str, Array]:
        """What another rank's owner has kept: in this one's, if it has the same regions.

        Else it joins what waits in the rank's own residual: sums over ranks stay what they are.
        """
        assert other.owners is not None
        theirs = list(other.owners.pieces())
        own = [] if self.owners is None else list(self.owners.pieces())
        if _extents(own) == _extents(theirs):
            for mine, before in zip(own, theirs, strict=True):
                factor_as = mine.sums.dtype.type(factor)
                np.multiply(before.sums, factor_as, out=mine.sums, casting="unsafe")
            return waiting
        for piece in theirs:
            if piece.sums.any():
                name = piece.layer.name
                whole = np.array(other.backends[name].to_host(waiting[name]))
                whole[piece.places] += piece.sums
                waiting[name] = whole
        return waiting

    def _senders_for(self, name: str) -> float:
        """How many ranks send a layer, for each one that sends compressed layers."""
        goes_dense = all(layer.name != name for layer in self.plan.sparse)
        return 1 / self.groups.weight if goes_dense else 1.0

    def with_leftover(self, name: str, gradient: Array) -> Array:
        """A dense gradient, and what once waited in its residual, added in place."""
        if name in self.leftovers:
            self.backends[name].add(gradient, self.leftovers[name])
        return gradient

    def forget_leftovers(self, names: Collection[str]) -> None:
        """The gradients of these layers have been applied."""
        for name in self.leftovers.keys() & set(names):
            del self.leftovers[name]

    def state(self) -> dict[str, Any]:
        """Plain values and arrays; the large ones are not copied."""
        stable = {layer.name: layer.stable_name for layer in self.plan.layers}
        residuals, velocities = self.residuals | self.leftovers, self.correction.velocities
        return (
            {
                "version": STATE_VERSION,
                "rank": self.groups.rank,
                "world_size": self.groups.world_size,
                "groups": list(self.groups.sizes),
                "config": self.config.as_plain(),
                "parameters": [[x.stable_name, list(x.shape)] for x in self.plan.layers],
                "layers": [
                    [x.stable_name, [*x.shape, x.work_dtype.name]] for x in self.plan.sparse
                ],
                "step": self.controller.step,
                "loss_scale": self.loss_scale,
                "ratios": self.controller.state(),
                "thresholds": np.array(list(self.thresholds.values())),
                "norms": [] if self.baseline is None else list(self.baseline.norms.values()),
                "residuals": {stable[name]: array for name, array in residuals.items()},
                "velocities": {stable[name]: array for name, array in velocities.items()},
            }
            | self._state_of_adam(stable)
            | self._state_of_owners()
            | self._usual_shares(stable)
        )

    def _state_of_adam(self, stable: Mapping[str, str]) -> dict[str, Any]:
        if not self.config.adam:
            return {}
        second, weights = self.correction.second_moments, self.correction.weights
        return {
            "second_moments": {stable[name]: array for name, array in second.items()},
            "moment_weights": {stable[name]: np.array(own) for name, own in weights.items()},
        }

    def _usual_shares(self, stable: Mapping[str, str]) -> dict[str, Any]:
        if self.correction.shares is None:
            return {}
        squares = self.correction.shares.squares
        return {"usual_shares": {stable[name]: share for name, share in squares.items()}}

    def _state_of_owners(self) -> dict[str, Any]:
        if self.owners is None:
            return {}
        return {"kept": self._kept()}

    def _kept(self) -> dict[str, np.ndarray]:
        """What owners have kept, as in a state: by "layer@piece"."""
        pieces = () if self.owners is None else self.owners.pieces()
        return {f"{piece.layer.stable_name}@{piece.label}": piece.sums for piece in pieces}

    def check(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """Whether a saved state fits.

        Returns:
            The state, in the present version.

        Raises:
            StateMismatchError: it belongs to other layers, another configuration, another rank or
                another number of ranks, or is damaged; the message names the first difference.
        """
        own = [layer.stable_name for layer in self.layers if layer.name in self.residuals]
        if isinstance(state, Mapping) and MOVED in state:
            with damage_named():
                anew = Controller(self.plan, self.config, self.controller.wanted, self._rows)
                anew.start_at(int(state["step"]))
                state = fitted(state, self.state(), own, anew.state(), self.averages)
        state = check_state(state, self.state(), self.plan.sizes, own)
        self.controller.check(np.asarray(state["ratios"], np.int64))
        if self.owners is not None:
            with damage_named():
                self._check_kept(state)
        return state

    def _check_kept(self, state: Mapping[str, Any]) -> None:
        sizes = {x.stable_name: x.size for x in self.plan.sparse if x.name in self.residuals}
        for key, saved in state["kept"].items():
            name, piece = key.rsplit("@", 1)
            expected = len(places_of(sizes[name], piece)) if name in sizes else 0
            array = np.asarray(saved)
            if array.shape != (expected,) or not np.isfinite(array).all():
                raise StateMismatchError(
                    f"layer {name!r}: what an owner has kept of piece {piece} is saved in shape "
                    f"{array.shape}, expected {expected} finite numbers"
                )

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on from a saved state that ``check`` returned, copying it."""
        self.controller.restore(np.asarray(state["ratios"], np.int64))
        self.thresholds = dict(zip(self.thresholds, map(float, state["thresholds"]), strict=True))
        if self.baseline is not None:
            self.baseline.norms = dict(zip(self.residuals, map(float, state["norms"]), strict=True))
        self._start_baseline()
        self.loss_scale = float(state["loss_scale"])
        self.leftovers = {
            layer.name: self.backends[layer.name].zeros(layer.size, layer.work_dtype)
            for layer in self.plan.layers
            if layer.name not in self.residuals and layer.stable_name in state["residuals"]
        }
        stable = {layer.name: layer.stable_name for layer in self.plan.layers}
        if self.correction.shares is not None:
            saved = state.get("usual_shares", {})
            there = {name: saved[key] for name, key in stable.items() if key in saved}
            self.correction.shares.load(there)
        arrays = {
            "residuals": self.residuals | self.leftovers,
            "velocities": self.correction.velocities,
            "second_moments": self.correction.second_moments,
        }
        for part, own in arrays.items():
            for name, array in own.items():
                self.backends[name].load(array, state[part][stable[name]])
        for name in self.correction.weights:
            weights = state["moment_weights"][stable[name]]
            self.correction.weights[name] = Weights(*map(float, weights))
        if self.owners is not None:
            self._load_kept(state["kept"])

    def _load_kept(self, saved: Mapping[str, Any]) -> None:
        """What owners had kept; of regions that are not this rank's now, in its residuals."""
        own = self._kept()
        for key, sums in own.items():
            # In a checkpoint it is in the residuals, and here nothing.
            sums[:] = np.asarray(saved.get(key, 0.0))
        named = {layer.stable_name: layer.name for layer in self.layers}
        for key in saved.keys() - own.keys():  # buckets were others: see bucket_bytes
            name, piece = key.rsplit("@", 1)
            residual = self.residuals[named[name]]
            residual[places_of(len(residual), piece)] += np.asarray(saved[key])


def _extents(pieces: list[KeptPiece]) -> list[tuple[str, str, int]]:
    return [(piece.layer.name, piece.label, len(piece.sums)) for piece in pieces]
