"""One model's compression on one rank: a gradient in, a payload out; all payloads in, a sum out.

A step is a transaction.  ``compress`` only looks; nothing changes until the payloads of all ranks
are there and none of them tells of NaN or Inf.  ``Controller`` holds what all ranks agree on; a
session holds what is this rank's own: residuals, thresholds, and the step in progress.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from hvd_dls.config import DLSConfig
from hvd_dls.core.buckets import make_buckets
from hvd_dls.core.controller import Controller
from hvd_dls.core.layers import LayerSpec
from hvd_dls.core.passes import Found, find, settle
from hvd_dls.core.payload import ABSENT, NOT_FINITE, Payload, pack, unpack
from hvd_dls.core.plan import initial_k, make_plan
from hvd_dls.core.sketch import WINDOW
from hvd_dls.core.telemetry import StepRecord, measure_quality
from hvd_dls.errors import DLSError, NonFiniteGradientError, StateMismatchError

STATE_VERSION = 1
# May differ between saving and loading.
FREE_OPTIONS = ("measure_every", "bucket_bytes", "values", "index_code")


@dataclass
class _Step:
    """A step in progress.

    Attributes:
        gradients: (n,) of the layers that have come in, by name.
        found: what each of them sends; None where the gradient was not finite.
        missing: how many layers of each bucket that was begun have not come in.
        kept: what rounding to 16 bits leaves of each layer's values, by bucket.
        sent: length of each payload that went out, by bucket.
        received: all ranks' payloads, by bucket.
        settled: layers whose residual and gradient are done.
    """

    gradients: dict[str, np.ndarray] = field(default_factory=dict)
    found: dict[str, Found | None] = field(default_factory=dict)
    missing: dict[int, int] = field(default_factory=dict)
    kept: dict[int, list[np.ndarray | None]] = field(default_factory=dict)
    sent: dict[int, int] = field(default_factory=dict)
    received: dict[int, list[Payload]] = field(default_factory=dict)
    settled: set[str] = field(default_factory=set)


class Session:
    """Compresses the gradients of one model.

    In a step, each sparse layer goes through ``compress``; each bucket that is complete through
    ``payload``, the network, and ``receive``; then each layer through ``decompress``.  When all
    have, the step ends and the ratios move.  A bucket of which only some layers take part in a
    step is among ``unfinished`` in the end.

    Args:
        layers: all parameters, in model order.
        config: the options.
        world_size: number of ranks, P.
        norms: Frobenius norm of each layer's weights, for prior="weight_norm".

    Raises:
        DLSError: see ``make_plan``.
    """

    def __init__(
        self,
        layers: Sequence[LayerSpec],
        config: DLSConfig,
        world_size: int,
        norms: Mapping[str, float] | None = None,
    ) -> None:
        self.config = config
        self.world_size = world_size
        self.plan = make_plan(layers, config, world_size)
        self.buckets = make_buckets(self.plan.sparse, config)
        self._layers = {layer.name: layer for layer in self.plan.sparse}
        # Of each layer: its bucket, and its position therein.
        self._place = {
            layer.name: (number, position)
            for number, bucket in enumerate(self.buckets)
            for position, layer in enumerate(bucket.layers)
        }
        row = {layer.name: row for row, layer in enumerate(self.plan.sparse)}
        self._rows = [np.array([row[x.name] for x in b.layers]) for b in self.buckets]
        k = initial_k(self.plan, config, norms)
        self._controller = Controller(self.plan, config, k, self._rows)
        self.residuals = {n: np.zeros(x.size, x.work_dtype) for n, x in self._layers.items()}
        self._thresholds = dict.fromkeys(self._layers, 0.0)
        self._step = _Step()
        self.last_step: StepRecord | None = None

    # The way of a gradient ----------------------------------------------------------------------

    @property
    def k(self) -> np.ndarray:
        """(L,) entries each sparse layer sends in the current step."""
        return self._controller.k

    def is_sparse(self, name: str) -> bool:
        """Whether the plan compresses this layer."""
        return name in self._layers

    def compress(self, name: str, gradient: np.ndarray) -> int | None:
        """Looks for the largest entries of a layer's residual plus its gradient.

        Args:
            name: of a sparse layer.
            gradient: (n,) contiguous, of the layer's work dtype, float16, or uint16 (the bits of
                bfloat16); it must not change before ``decompress``.

        Returns:
            The number of the bucket that is complete with this layer and should be sent, or None.

        Raises:
            DLSError: the layer has been in this step already, or the gradient has another size.
        """
        step, layer = self._step, self._layers[name]
        if name in step.gradients:
            raise DLSError(f"layer {name!r}: compressed twice before it was decompressed")
        if gradient.shape != (layer.size,):
            raise DLSError(
                f"layer {name!r}: gradient of shape {gradient.shape}, expected ({layer.size},)"
            )
        k = self._controller.k_of(name)
        found = find(self.residuals[name], gradient, k, self._thresholds[name])
        step.gradients[name], step.found[name] = gradient, found
        bucket, _ = self._place[name]
        step.missing[bucket] = step.missing.get(bucket, len(self.buckets[bucket].layers)) - 1
        return None if step.missing[bucket] else bucket

    @property
    def complete(self) -> bool:
        """Whether all layers have come in, and so all buckets have been sent."""
        return len(self._step.gradients) == len(self._layers)

    def unfinished(self) -> list[int]:
        """Buckets with some layers in this step that have not been sent: send them now."""
        return sorted(self._step.missing.keys() - self._step.sent.keys())

    def payload(self, bucket: int) -> np.ndarray:
        """What this rank sends of a bucket: uint8, as long as every other rank's."""
        found = [self._step.found.get(x.name, ABSENT) for x in self.buckets[bucket].layers]
        packed = pack(self.buckets[bucket], self._entries_of(bucket), self._k_of(bucket), found)
        self._step.sent[bucket] = len(packed.payload)
        self._step.kept[bucket] = packed.kept
        return packed.payload

    def receive(self, bucket: int, gathered: np.ndarray) -> None:
        """Takes what all ranks sent of a bucket.

        Args:
            bucket: its number.
            gathered: (world_size * payload length,) uint8, payloads in rank order.

        Raises:
            PayloadError: the payloads are not this bucket's.
        """
        self._step.received[bucket] = unpack(
            self.buckets[bucket],
            self._entries_of(bucket),
            self._k_of(bucket),
            gathered,
            self.world_size,
        )

    def decompress(self, name: str, out: np.ndarray, scale: float = 1.0) -> None:
        """Adds up what all ranks sent of a layer; with the last layer, ends the step.

        Args:
            name: of a layer that went through ``compress``.
            out: (n,) overwritten with the sum over ranks, added rank by rank and so the same bits
                on every rank; may be the gradient itself.  Its dtype is one that ``compress``
                takes.
            scale: factor on the sum.

        Raises:
            DLSError: the layer, or a bucket of this step, has not arrived.
            NonFiniteGradientError: some rank's gradient held NaN or Inf; on every rank alike, in
                the first call of the step.  All residuals are as they were before the step.
        """
        step, (bucket, position) = self._step, self._place[name]
        if name not in step.gradients or name in step.settled:
            raise DLSError(f"layer {name!r}: decompressed, but not on its way")
        if not step.settled:
            self._check_arrived()
        found = step.found[name]
        assert found is not None  # or the step would have been refused
        settle(
            self.residuals[name],
            step.gradients[name],
            found.indices,
            step.kept[bucket][position],
            [payload.entries(position) for payload in step.received[bucket]],
            scale,
            out,
        )
        step.settled.add(name)
        if len(step.settled) == len(step.gradients):
            self._end_step()

    def _check_arrived(self) -> None:
        step = self._step
        if missing := step.missing.keys() - step.received.keys():
            raise DLSError(f"decompressed before buckets {sorted(missing)} were received")
        not_finite = [
            (self.buckets[bucket].layers[position].name, rank)
            for bucket, payloads in step.received.items()
            for rank, payload in enumerate(payloads)
            for position in np.flatnonzero(payload.status == NOT_FINITE)
        ]
        if not_finite:
            self._step = _Step()
            raise NonFiniteGradientError(not_finite)

    def _end_step(self) -> None:
        step, self._step = self._step, _Step()
        for name, found in step.found.items():
            assert found is not None
            self._thresholds[name] = found.threshold
        k = self._controller.k.copy()
        self._controller.advance(*self._sketches(step))
        self.last_step = self._record(k, step)

    def _sketches(self, step: _Step) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What ``Controller.advance`` takes."""
        shape = len(self._layers), self.world_size
        present = np.zeros(shape[0], bool)
        bases, counts = np.zeros(shape, np.int64), np.zeros((*shape, WINDOW))
        for bucket, payloads in step.received.items():
            rows = self._rows[bucket]
            present[rows] = [layer.name in step.found for layer in self.buckets[bucket].layers]
            for rank, payload in enumerate(payloads):
                bases[rows, rank], counts[rows, rank] = payload.bases, payload.counts
        rows = np.flatnonzero(present)
        return rows, bases[rows], counts[rows]

    def _record(self, k: np.ndarray, step: _Step) -> StepRecord:
        every = self.config.measure_every
        quality = None
        if every and self._controller.step % every == 0:
            sent = [found.values for found in step.found.values() if found is not None]
            quality = measure_quality(sent, [self.residuals[name] for name in step.found])
        return StepRecord(
            step=self._controller.step,
            time=time.time(),
            names=tuple(self._layers),
            sizes=self.plan.sizes,
            k=k,
            thresholds=np.array(list(self._thresholds.values())),
            sparse_bytes=sum(step.sent.values()),
            dense_bytes=self.plan.dense_bytes,
            quality=quality,
        )

    def _k_of(self, bucket: int) -> np.ndarray:
        k: np.ndarray = self._controller.k[self._rows[bucket]]
        return k

    def _entries_of(self, bucket: int) -> int:
        return int(self._controller.budgets.budgets[bucket])

    # Agreement at the start ---------------------------------------------------------------------

    def agreed(self) -> np.ndarray:
        """Step and ratios, int64, which rank 0 hands to the others."""
        return self._controller.state()

    def agree(self, agreed: np.ndarray) -> None:
        """Takes over rank 0's ``agreed()``."""
        self._controller.restore(agreed)

    # State --------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """This rank's training state: plain values and arrays (residuals are not copied)."""
        if self._step.gradients:
            raise DLSError("state_dict() in the middle of a step: call it after optimizer.step()")
        return self._state()

    def _state(self) -> dict[str, Any]:
        return {
            "version": STATE_VERSION,
            "config": asdict(self.config),
            "world_size": self.world_size,
            "layers": [
                [layer.name, [*layer.shape, layer.work_dtype.name]] for layer in self.plan.sparse
            ],
            "step": self._controller.step,
            "ratios": self._controller.state(),
            "thresholds": np.array(list(self._thresholds.values())),
            "residuals": dict(self.residuals),
        }

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Whether a saved state fits.

        Raises:
            StateMismatchError: it belongs to other layers, another configuration or another
                number of ranks; the message names the first difference.
        """
        own = self._state()
        if state.get("version") != STATE_VERSION:
            raise StateMismatchError(
                f"saved state has version {state.get('version')}, expected {STATE_VERSION}"
            )
        if missing := own.keys() - state.keys():
            raise StateMismatchError(f"the saved state lacks {', '.join(sorted(missing))}")
        for option, value in own["config"].items():
            saved = state["config"].get(option)
            if saved != value and option not in FREE_OPTIONS:
                raise StateMismatchError(f"saved with {option}={saved!r}, but it is {value!r} now")
        if state["world_size"] != self.world_size:
            raise StateMismatchError(
                f"saved by one of {state['world_size']} ranks, but there are {self.world_size} now"
            )
        self._check_layers(dict(state["layers"]), dict(own["layers"]))
        if len(state["ratios"]) < 2 + 2 * len(self._layers):
            raise StateMismatchError(f"the saved ratios have only {len(state['ratios'])} numbers")
        for part in ("thresholds", "residuals"):
            if len(state[part]) != len(own[part]):
                raise StateMismatchError(
                    f"the saved state has {len(state[part])} {part}, expected {len(own[part])}"
                )
        for name, residual in self.residuals.items():
            saved_shape = np.shape(state["residuals"].get(name, ()))
            if saved_shape != residual.shape:
                raise StateMismatchError(
                    f"layer {name!r}: saved residual of shape {saved_shape}, expected "
                    f"{residual.shape}"
                )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a saved state, copying it; a step in progress is forgotten.

        Raises:
            StateMismatchError: see ``check_state``; nothing has changed then.
        """
        self.check_state(state)
        self._step = _Step()
        self._controller.restore(np.asarray(state["ratios"], np.int64))
        self._thresholds = dict(zip(self._layers, map(float, state["thresholds"]), strict=True))
        for name, residual in self.residuals.items():
            residual[:] = np.asarray(state["residuals"][name])

    @staticmethod
    def _check_layers(saved: Mapping[str, list[Any]], own: Mapping[str, list[Any]]) -> None:
        for name in saved:
            if name not in own:
                raise StateMismatchError(f"saved with a compressed layer {name!r}, not there now")
        for name, shape in own.items():
            if name not in saved:
                raise StateMismatchError(f"compressed layer {name!r} is not in the saved state")
            if list(saved[name]) != shape:
                raise StateMismatchError(
                    f"layer {name!r} was saved as {list(saved[name])}, it is {shape} now"
                )
        if list(saved) != list(own):
            raise StateMismatchError("the saved layers stand in another order")
