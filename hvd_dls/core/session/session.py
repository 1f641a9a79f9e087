"""One model's compression on one rank: a gradient in, a payload out; all payloads in, a sum out.

A step is a transaction.  What comes in is only looked at; nothing changes until the payloads of all
ranks are there and none of them tells of NaN or Inf.  ``Controller`` holds what all ranks agree on;
a session holds what is this rank's own: residuals, velocities, thresholds, the step in progress.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hvd_dls.config import DLSConfig
from hvd_dls.core.balancing.layers import LayerSpec
from hvd_dls.core.balancing.plan import measured_k
from hvd_dls.core.selection.backend import Array, Backend, Future
from hvd_dls.core.selection.passes import Found, nothing_found
from hvd_dls.core.session.memory import Memory
from hvd_dls.core.session.planning import make_plan
from hvd_dls.core.session.recorder import Recorder
from hvd_dls.core.session.step import Step
from hvd_dls.core.session.telemetry import StepRecord
from hvd_dls.core.wire.buckets import make_buckets
from hvd_dls.core.wire.payload import ABSENT, pack, unpack, unpack_varying
from hvd_dls.errors import DLSError, NonFiniteGradientError


class Session:
    """Compresses the gradients of one model.

    In a step, each layer that ``is_sparse`` goes through ``compress``, each other one through
    ``note``; each bucket that is complete through ``payload``, the network, and ``receive``; then
    each layer through ``decompress`` or ``accept``.  When all have, the step ends and the ratios
    move.  A bucket of which only some layers take part in a step is among ``unfinished`` in the
    end.

    Args:
        layers: all parameters, in model order.
        config: the options.
        world_size: number of ranks, P.
        norms: Frobenius norm of each layer's weights, for prior="weight_norm".
        backends: where arrays of layers are that are not on the host, by name.

    Attributes:
        residuals: (n,) of each compressed layer, by name.
        skipped: steps that were skipped for NaN or Inf.
        last_step: what happened in the last step that was not.

    Raises:
        DLSError: see ``make_plan`` and ``make_buckets``.
    """

    def __init__(
        self,
        layers: Sequence[LayerSpec],
        config: DLSConfig,
        world_size: int,
        norms: Mapping[str, float] | None = None,
        backends: Mapping[str, Backend] | None = None,
    ) -> None:
        self.config = config
        self.world_size = world_size
        self.plan = make_plan(layers, config, world_size)
        self.buckets = make_buckets(self.plan.layers, self.plan.sparse, config)
        self._layers = {layer.name: layer for layer in self.plan.sparse}
        # Of each compressed layer: its bucket, and its position therein.
        self._position = {
            layer.name: (number, position)
            for number, bucket in enumerate(self.buckets)
            for position, layer in enumerate(bucket.layers)
        }
        self._members = [{*(x.name for x in b.layers), *b.watched} for b in self.buckets]
        self._bucket_of = {n: number for number, names in enumerate(self._members) for n in names}
        self._row = {layer.name: row for row, layer in enumerate(self.plan.sparse)}
        self._rows = [np.array([self._row[x.name] for x in b.layers]) for b in self.buckets]
        self._memory = Memory(self.plan, config, world_size, self._rows, norms, backends)
        self._controller = self._memory.controller
        self._correction = self._memory.correction
        self._own = self._memory.baseline
        self._backends = self._memory.backends
        self.residuals = self._memory.residuals
        self._recorder = Recorder(self.plan, config, self._memory)
        self._step = Step()
        self._refused = False
        self.skipped = 0
        self.last_step: StepRecord | None = None

    # The way of a gradient ----------------------------------------------------------------------

    @property
    def k(self) -> np.ndarray:
        """(L,) entries each sparse layer sends in the current step, as far as ranks agree on it."""
        return self._controller.k

    def is_sparse(self, name: str) -> bool:
        """Whether a layer is compressed in the current step."""
        return name in self._layers and not self._controller.dense

    def may_be_sparse(self, name: str) -> bool:
        """Whether a layer is compressed in some steps."""
        return name in self._layers

    def takes_part(self, name: str) -> bool:
        """Whether there is anything to do for a layer, compressed or not."""
        return name in self._bucket_of or self._correction.active

    def bucket_of(self, name: str) -> int | None:
        """Number of the bucket that a layer travels in, or that tells whether it is finite."""
        return self._bucket_of.get(name)

    @property
    def in_step(self) -> bool:
        """Whether a step has begun and not ended."""
        return bool(self._step.arrived)

    @property
    def dense_step(self) -> bool:
        """Whether the current step sends whole gradients, and their sums must be looked at.

        With no payloads to tell of NaN and Inf, velocities are safe in no other way.
        """
        return self._controller.dense or (self.corrects and not self.buckets)

    @property
    def corrects(self) -> bool:
        """Whether gradients that go dense must go through ``correct`` first."""
        return self._correction.active

    def compress(self, name: str, gradient: Array) -> int | None:
        """Looks for the largest entries of a layer's residual plus its gradient.

        Args:
            name: of a layer that ``is_sparse``.
            gradient: (n,) contiguous, of the layer's work dtype, float16, or uint16 (the bits of
                bfloat16), or what the layer's backend takes; it must not change before
                ``decompress``.

        Returns:
            The number of the bucket that is complete with this layer and should be sent, or None.
            (With layers on a device ``ready`` tells what can be sent without waiting for it.)

        Raises:
            DLSError: the layer has been in this step already, or the gradient has another size.
        """
        self._arrive(name, gradient)
        if self._correction.active:
            gradient = self._correction.apply(name, gradient, self.loss_scale)
        self._step.gradients[name] = gradient
        if self._own is None:
            self._find(name, self._controller.k_of(name))
        elif not self._own.needs_all:
            k = self._own.k_of(name, self.residuals[name], gradient, self.loss_scale)
            self._find(name, k)
        return self._complete(name)

    def correct(self, name: str, gradient: Array) -> Array:
        """What to send of a layer that goes dense, if gradients are clipped or get momentum.

        Args:
            name: of a layer.
            gradient: as for ``compress``.

        Returns:
            (n,) of the work dtype, the caller's to change.
        """
        corrected = self._correction.apply(name, gradient, self.loss_scale)
        return corrected if self.config.nesterov else self._backends[name].copy(corrected)

    def note(self, name: str, finite: bool | Future[bool]) -> int | None:
        """Takes note of a layer that goes dense.

        Args:
            name: of a layer that is not ``is_sparse``.
            finite: whether its gradient is free of NaN and Inf on this rank.

        Returns:
            As ``compress``.

        Raises:
            DLSError: the layer has been in this step already.
        """
        self._arrive(name)
        if isinstance(finite, Future):
            self._step.futures[name] = finite
        elif not finite:
            self._step.not_finite.append(name)
        return self._complete(name)

    def _arrive(self, name: str, gradient: Array | None = None) -> None:
        step = self._step
        if name in step.arrived:
            raise DLSError(f"layer {name!r}: compressed twice before it was decompressed")
        if gradient is not None and gradient.shape != (self._layers[name].size,):
            raise DLSError(
                f"layer {name!r}: gradient of shape {gradient.shape}, expected "
                f"({self._layers[name].size},)"
            )
        self._refused = False
        step.arrived.add(name)

    def _complete(self, name: str) -> int | None:
        bucket = self._bucket_of.get(name)
        if bucket is None or self._controller.dense:
            return None
        missing = self._step.missing
        missing[bucket] = missing.get(bucket, len(self._members[bucket])) - 1
        return None if missing[bucket] else bucket

    @property
    def complete(self) -> bool:
        """Whether all layers have come in, and so all buckets have been or can be sent."""
        return sum(not missing for missing in self._step.missing.values()) == len(self.buckets)

    def ready(self) -> list[int]:
        """Buckets that are complete, have not been sent, and need not be waited for: send them."""
        step = self._step
        return [
            bucket
            for bucket, missing in step.missing.items()
            if not missing and bucket not in step.sent
            if all(step.futures[name].ready() for name in self._working_on(bucket))
        ]

    def _working_on(self, bucket: int) -> set[str]:
        """Layers of a bucket of which a device has not been heard."""
        return self._members[bucket] & self._step.futures.keys()

    def future_of(self, name: str) -> Future[Any]:
        """What a device is still working on, of a layer that has come in and was not sent yet."""
        return self._step.futures[name]

    def unfinished(self) -> list[int]:
        """Buckets with some layers in this step that have not been sent: send them now."""
        return sorted(self._step.missing.keys() - self._step.sent.keys())

    def payload(self, bucket: int) -> np.ndarray:
        """What this rank sends of a bucket: uint8; as long as every other rank's if they agree.

        Waits for devices that are still working on it.
        """
        step, layers = self._step, self.buckets[bucket].layers
        for name in self._working_on(bucket):
            result = step.futures.pop(name).result()
            if name in self._layers:
                step.found[name] = result
            elif not result:
                step.not_finite.append(name)
        if self._own is not None and self._own.needs_all:
            together = self._own.k_together(self.residuals, step.gradients)
            for name, own in together.items():
                self._find(name, own)
        found = [step.found.get(x.name, ABSENT) for x in layers]
        if self._own is not None:
            k = np.array([len(f.indices) if isinstance(f, Found) else 0 for f in found])
        else:
            k = self._k_of(bucket)
        watched = self.buckets[bucket].watched
        not_finite = next((name for name in watched if name in step.not_finite), None)
        packed = pack(self.buckets[bucket], k, found, not_finite)
        step.sent[bucket] = len(packed.payload)
        step.kept[bucket] = packed.kept
        return packed.payload

    def receive(self, bucket: int, gathered: np.ndarray) -> None:
        """Takes what all ranks sent of a bucket.

        Args:
            bucket: its number.
            gathered: uint8, all payloads in rank order.

        Raises:
            PayloadError: the payloads are not this bucket's.
        """
        of = self.buckets[bucket]
        if self._own is not None:
            self._step.received[bucket] = unpack_varying(of, gathered, self.world_size)
        else:
            k = self._k_of(bucket)
            self._step.received[bucket] = unpack(of, k, gathered, self.world_size)

    def decompress(self, name: str, out: Array, scale: float = 1.0) -> None:
        """Adds up what all ranks sent of a layer; with the last layer, ends the step.

        Args:
            name: of a layer that went through ``compress``.
            out: (n,) overwritten with the sum over ranks, added rank by rank and so the same bits
                on every rank; may be the gradient itself.  Its dtype is one that ``compress``
                takes, and it is where the gradient is.  Inf everywhere, if the step is skipped.
            scale: factor on the sum; or what the layer's backend takes for a number.

        Raises:
            DLSError: the layer, or a bucket of this step, has not arrived.
            NonFiniteGradientError: with nonfinite="raise", some rank's gradient held NaN or Inf; on
                every rank alike, in the first call of the step.  All residuals are as they were
                before the step.
        """
        step, (bucket, position), backend = self._step, self._position[name], self._backends[name]
        if name not in step.gradients or name in step.settled:
            raise DLSError(f"layer {name!r}: decompressed, but not on its way")
        self._check_arrived()
        if step.refused:
            backend.fill_infinite(out)
            self._settled(name)
            return
        found = step.found[name]
        assert found is not None  # or the step would have been refused
        residual = self.residuals[name]
        backend.settle(
            residual,
            step.gradients[name],
            found.indices,
            step.kept[bucket][position],
            [payload.entries(position) for payload in step.received[bucket]],
            scale,
            out,
        )
        if self._own is not None:
            self._own.take_note(name, residual, found.values)
        self._settled(name)

    def accept(self, name: str, reduced: Array | None = None) -> bool:
        """Takes note that a layer that went dense has been reduced; with the last, ends the step.

        Args:
            name: of a layer that went through ``note``.
            reduced: (n,) what came back, in a ``dense_step``, where the gradient was; else None.

        Returns:
            Whether it counts; not if the step is skipped.

        Raises:
            As ``decompress``; in a ``dense_step``, with the step's last layer.
        """
        step = self._step
        if name not in step.arrived or name in step.settled:
            raise DLSError(f"layer {name!r}: reduced, but not on its way")
        if not self.dense_step:
            self._check_arrived()
        elif reduced is not None:
            backend = self._backends[name]
            if not backend.finite(reduced):
                before = step.refused.where if step.refused else []
                step.refused = NonFiniteGradientError([*before, (name, None)])
            elif self._controller.measures_now and name in self._layers:
                step.whole[name] = backend.histogram(reduced)
        counts = step.refused is None
        self._settled(name)
        return counts

    # The end of a step --------------------------------------------------------------------------

    @property
    def refused(self) -> bool:
        """Whether the step in progress, or the last one if none has begun since, is skipped."""
        return self._refused

    def _check_arrived(self) -> None:
        """Before the first change: is everything there, and good?"""
        step = self._step
        if step.settled:
            return
        if missing := step.missing.keys() - step.received.keys():
            raise DLSError(f"decompressed before buckets {sorted(missing)} were received")
        if not (where := step.found_not_finite(self.buckets)):
            return
        step.refused = NonFiniteGradientError(where)
        if self.config.nonfinite == "raise":
            self._forget_step()
            raise step.refused
        self._refused = True

    def _settled(self, name: str) -> None:
        step = self._step
        step.settled.add(name)
        if len(step.settled) < len(step.arrived):
            return
        self._forget_step(step.refused is not None)
        if step.refused is None:
            self._end_step(step)
            return
        if self.config.nonfinite == "raise":
            raise step.refused
        self._refused = True
        self.skipped += 1

    def _forget_step(self, also_velocities: bool = True) -> None:
        self._step = Step()
        if also_velocities:
            self._correction.forget()

    def _end_step(self, step: Step) -> None:
        found = {name: f for name, f in step.found.items() if f is not None}
        self._correction.commit({name: f.indices for name, f in found.items()})
        for name, f in found.items():
            self._memory.thresholds[name] = f.threshold
        if self._controller.dense:
            self._controller.advance()
            self.last_step = self._recorder.record_whole(step)
            if step.whole:
                density = self._controller.density
                k = measured_k(self.plan, self.config, step.whole, density)
                self._controller.start_from(k)
            return
        k = self._controller.k.copy()
        if self._own is not None:
            k[:] = 0
            for name, f in found.items():
                k[self._row[name]] = len(f.indices)
            self._controller.advance()
            self._own.start_step(self._controller.density)
        else:
            self._controller.advance(*step.sketches(self.buckets, self._rows, self.world_size))
        self.last_step = self._recorder.record(step, k)

    def _k_of(self, bucket: int) -> np.ndarray:
        k: np.ndarray = self._controller.k[self._rows[bucket]]
        return k

    def _find(self, name: str, k: int) -> None:
        found = self._backends[name].find(
            self.residuals[name],
            self._step.gradients[name],
            max(k, 1),
            self._memory.thresholds[name],
        )
        if isinstance(found, Future):
            assert self._own is None  # whose strategies look at residuals, on the host
            self._step.futures[name] = found
        else:
            self._step.found[name] = found if k or found is None else nothing_found(found)

    # Between steps ------------------------------------------------------------------------------

    @property
    def loss_scale(self) -> float:
        """What residuals and velocities are multiplied by."""
        return self._memory.loss_scale

    def scale_to(self, loss_scale: float) -> None:
        """Tells what the loss, and so each gradient to come, is multiplied by.

        Raises:
            DLSError: it is not a finite number > 0, or a step is in progress.
        """
        if loss_scale == self.loss_scale:
            return
        if self.in_step:
            raise DLSError(
                f"the loss scale changed from {self.loss_scale} to {loss_scale} within a step"
            )
        self._memory.scale_to(loss_scale)

    def agreed(self) -> np.ndarray:
        """Step and ratios, int64, which rank 0 hands to the others."""
        return self._controller.state()

    def agree(self, agreed: np.ndarray) -> None:
        """Takes over rank 0's ``agreed()``."""
        self._memory.agree(agreed)

    def state_dict(self) -> dict[str, Any]:
        """This rank's training state: plain values and arrays (the large ones are not copied)."""
        if self.in_step:
            raise DLSError("state_dict() in the middle of a step: call it after optimizer.step()")
        return self._memory.state()

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Whether a saved state fits: see ``Memory.check``."""
        self._memory.check(state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a saved state, copying it; a step in progress is forgotten.

        Raises:
            StateMismatchError: see ``Memory.check``; nothing has changed then.
        """
        self.check_state(state)
        self._forget_step()
        self._memory.load(state)
