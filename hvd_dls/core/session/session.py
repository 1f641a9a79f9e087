"""One model's compression on one rank: a gradient in, a payload out; all payloads in, a sum out.

A step is a transaction.  What comes in is only looked at; nothing changes until the payloads of all
ranks are there and none of them tells of NaN or Inf.  Until then a step can be abandoned.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from hvd_dls.config import DLSConfig
from hvd_dls.core.balancing.layers import LayerSpec
from hvd_dls.core.selection.backend import Array, Backend, Future
from hvd_dls.core.selection.passes import nothing_found
from hvd_dls.core.session import log
from hvd_dls.core.session.clock import SessionClock
from hvd_dls.core.session.ending import end_step
from hvd_dls.core.session.interrupts import Uninterrupted
from hvd_dls.core.session.memory import Memory
from hvd_dls.core.session.planning import make_plan
from hvd_dls.core.session.recorder import Recorder
from hvd_dls.core.session.routing import Routing
from hvd_dls.core.session.step import Step
from hvd_dls.core.session.telemetry import StepRecord
from hvd_dls.core.wire.layout import ABSENT, NOT_FINITE
from hvd_dls.core.wire.pack import pack, pack_abandoned
from hvd_dls.core.wire.unpack import headers_in, unpack, unpack_varying
from hvd_dls.errors import DLSError, NonFiniteGradientError, PayloadError


class Session:
    """Compresses the gradients of one model.

    In a step, each layer that ``is_sparse`` goes through ``compress``, each other one through
    ``note``, or either through ``leave_out``; each bucket that is complete through ``payload``, the
    network, and ``receive``; then each layer through ``decompress`` or ``accept``.  When all have,
    the step ends and the ratios move.  A bucket of which only some layers take part in a step is
    among ``unfinished`` in the end.

    Args:
        layers: all parameters, in model order.
        config: the options.
        world_size: number of ranks, P.
        rank: this one's number among them.
        norms: Frobenius norm of each layer's weights, for prior="weight_norm".
        backends: where arrays of layers are that are not on the host, by name.

    Attributes:
        residuals: (n,) of each compressed layer, by name.
        skipped: steps that were skipped for NaN or Inf.
        marks_skipped: whether the gradients of a skipped step become Inf, for who applies them to
            see; otherwise zero.
        untouched: layers that took no part on any rank in the step in progress, or in the last one.
        missed: layers that did not come in at all in the last step.
        last_step: what happened in the last step that was not skipped.

    Raises:
        DLSError: see ``make_plan`` and ``make_buckets``.
    """

    def __init__(
        self,
        layers: Sequence[LayerSpec],
        config: DLSConfig,
        world_size: int,
        rank: int = 0,
        norms: Mapping[str, float] | None = None,
        backends: Mapping[str, Backend] | None = None,
    ) -> None:
        self.config = config
        self.world_size = world_size
        self.rank = rank
        self.plan = make_plan(layers, config, world_size)
        self.routing = Routing(self.plan, config)
        self.memory = Memory(self.plan, config, world_size, rank, self.routing, norms, backends)
        self._layers = {layer.name: layer for layer in self.plan.sparse}
        self._row = {layer.name: row for row, layer in enumerate(self.plan.sparse)}
        self._backends = self.memory.backends
        self._recorder = Recorder(self.plan, config, self.memory)
        self._clock = SessionClock(self.memory.controller)
        self._step = Step(self.routing)
        self._refused = False
        self._writing: str | None = None  # what is being changed, and is spoiled if that fails
        self.skipped = 0
        self.marks_skipped = False
        self.untouched: frozenset[str] = frozenset()
        self.missed: frozenset[str] = frozenset()
        self.last_step: StepRecord | None = None

    # What is known of a layer, and of the step --------------------------------------------------

    @property
    def k(self) -> np.ndarray:
        """(L,) entries each sparse layer sends in the current step, as far as ranks agree on it."""
        return self.memory.controller.k

    @property
    def residuals(self) -> dict[str, Array]:
        """(n,) of each compressed layer, by name."""
        return self.memory.residuals

    def is_sparse(self, name: str) -> bool:
        """Whether a layer is compressed in the current step."""
        return name in self._layers and not self.memory.controller.dense

    def may_be_sparse(self, name: str) -> bool:
        """Whether a layer is compressed in some steps."""
        return name in self._layers

    def takes_part(self, name: str) -> bool:
        """Whether there is anything to do for a layer, compressed or not."""
        return self.bucket_of(name) is not None or not self.routing.buckets or self.corrects

    def bucket_of(self, name: str) -> int | None:
        """Number of the bucket that a layer travels in, or that tells whether it is finite."""
        return self.routing.bucket_of(name)

    @property
    def in_step(self) -> bool:
        """Whether a step has begun and not ended."""
        return bool(self._step.arrived)

    def has(self, name: str) -> bool:
        """Whether a layer has come in, in the step in progress."""
        return name in self._step.arrived

    @property
    def dense_step(self) -> bool:
        """Whether the current step sends whole gradients, and their sums must be looked at.

        Without payloads nothing else tells of NaN and Inf.
        """
        return self.memory.controller.dense or not self.routing.buckets

    @property
    def corrects(self) -> bool:
        """Whether gradients that go dense must go through ``correct`` first."""
        return self.memory.correction.active or bool(self.memory.leftovers)

    @property
    def refused(self) -> bool:
        """Whether the step in progress, or the last one if none has begun since, is skipped."""
        return self._refused

    # The way of a gradient ----------------------------------------------------------------------

    def begin(self, away: Collection[str] = ()) -> None:
        """Begins a step; not needed if there is nothing to say.

        Args:
            away: names of layers whose buckets need not wait for them: frozen ones, for example.

        Raises:
            DLSError: a step is in progress.
        """
        if self.in_step:
            raise DLSError("a step is in progress: end it or abandon it before another begins")
        self._step = Step(self.routing, away)
        self._begin()

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
        if gradient.shape != (self._layers[name].size,):
            raise DLSError(
                f"layer {name!r}: gradient of shape {gradient.shape}, expected "
                f"({self._layers[name].size},)"
            )
        self._arrive(name)
        correction, baseline = self.memory.correction, self.memory.baseline
        if correction.active:
            gradient = correction.apply(name, gradient, self.loss_scale)
        self._step.gradients[name] = gradient
        if baseline is None:
            self._find(name, self.memory.controller.k_of(name))
        elif not baseline.needs_all:
            k = baseline.k_of(name, self.residuals[name], gradient, self.loss_scale)
            self._find(name, k)
        return self._complete(name)

    def correct(self, name: str, gradient: Array) -> Array:
        """What to send of a layer that goes dense, if ``corrects``.

        Args:
            name: of a layer.
            gradient: as for ``compress``.

        Returns:
            (n,) of the work dtype, the caller's to change.
        """
        corrected = self.memory.correction.apply(name, gradient, self.loss_scale)
        if not self.config.nesterov:
            corrected = self._backends[name].copy(corrected)
        return self.memory.with_leftover(name, corrected)

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
            self._step.not_finite.add(name)
        return self._complete(name)

    def leave_out(self, name: str) -> int | None:
        """Takes note of a layer that takes no part on this rank: it is frozen, for example.

        Nothing is sent of it, and its residual and velocity stay as they are.  In the end it goes
        through ``decompress`` or ``accept`` like the others: other ranks may have sent something.

        Returns:
            As ``compress``.

        Raises:
            DLSError: the layer has been in this step already.
        """
        self._arrive(name, left_out=True)
        return self._complete(name)

    def _arrive(self, name: str, left_out: bool = False) -> None:
        if not self.in_step:
            self._begin()
        self._step.arrive(name, left_out)

    def _begin(self) -> None:
        self._check_sound()
        self._refused, self.untouched = False, frozenset()

    def _complete(self, name: str) -> int | None:
        return None if self.memory.controller.dense else self._step.complete_with(name)

    @property
    def complete(self) -> bool:
        """Whether all layers have come in, and so all buckets have been or can be sent."""
        return self._step.complete

    def ready(self) -> list[int]:
        """Buckets that are complete, have not been sent, and need not be waited for: send them."""
        return self._step.ready()

    def future_of(self, name: str) -> Future[Any]:
        """What a device is still working on, of a layer that has come in and was not sent yet."""
        return self._step.futures[name]

    def unfinished(self) -> list[int]:
        """Buckets with some layers in this step that have not been sent: send them now."""
        return [bucket for bucket in self._step.begun if bucket not in self._step.sent]

    def payload(self, bucket: int) -> np.ndarray:
        """What this rank sends of a bucket: uint8; as long as every other rank's if they agree.

        Waits for devices that are still working on it.
        """
        step, of = self._step, self.routing.buckets[bucket]
        for name in step.working_on(bucket):
            self._heard_of(name, step.futures[name].result())
            del step.futures[name]  # not before: waiting may be interrupted
        if self.memory.baseline is not None and self.memory.baseline.needs_all:
            together = self.memory.baseline.k_together(self.residuals, step.gradients)
            for name, k in together.items():
                self._find(name, k)
        found = [step.found.get(layer.name, ABSENT) for layer in of.layers]
        if self.memory.baseline is None:
            k_of_layers = self._k_of(bucket)
        else:  # this rank's own; of a layer that is not finite or absent, nothing
            there = [f if f is not ABSENT and f is not None else None for f in found]
            k_of_layers = np.array([0 if f is None else len(f.indices) for f in there])
        watched = step.status_of_watched(bucket)
        packed = pack(of, k_of_layers, found, watched, self._clock.now)
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
            RanksDisagreeError: some rank has abandoned this step, or is in another one: ``abandon``
                it here, too.
        """
        of = self.routing.buckets[bucket]
        try:
            if self.memory.baseline is not None:
                payloads = unpack_varying(of, gathered, self.world_size)
            else:
                payloads = unpack(of, self._k_of(bucket), gathered, self.world_size)
        except PayloadError:
            # Ranks in other steps send other numbers of entries.
            self._clock.check(headers_in(of, gathered, self.world_size))
            raise
        self._clock.check(payloads)
        self._step.received[bucket] = payloads

    def decompress(self, name: str, out: Array, scale: float = 1.0) -> None:
        """Adds up what all ranks sent of a layer; with the last layer, ends the step.

        Args:
            name: of a layer that went through ``compress`` or ``leave_out``.
            out: (n,) overwritten with the sum over ranks, added rank by rank and so the same bits
                on every rank; may be the gradient itself.  Its dtype is one that ``compress``
                takes, and it is where the gradient is.  Zeros, or Inf (see ``marks_skipped``), if
                the step is skipped.
            scale: factor on the sum; or what the layer's backend takes for a number.

        Raises:
            DLSError: the layer, or a bucket of this step, has not arrived.
            NonFiniteGradientError: with nonfinite="raise", some rank's gradient held NaN or Inf; on
                every rank alike, in the first call of the step.  All residuals are as they were
                before the step.
        """
        step, backend = self._step, self._backends[name]
        if name not in step.arrived or name in step.settled:
            raise DLSError(f"layer {name!r}: decompressed, but not on its way")
        if name not in step.gradients and not (name in step.left_out and self.may_be_sparse(name)):
            raise DLSError(f"layer {name!r}: decompressed, but it went dense")
        self._check_arrived()
        with Uninterrupted():
            if step.refused:
                backend.fill(out, np.inf if self.marks_skipped else 0.0)
            else:
                self._settle(name, out, scale)
            self._settled(name)

    def accept(self, name: str, reduced: Array | None = None) -> bool:
        """Takes note that a layer that went dense has been reduced; with the last, ends the step.

        Args:
            name: of a layer that went through ``note`` or ``leave_out``.
            reduced: (n,) what came back, in a ``dense_step``, where the gradient was; else None.

        Returns:
            Whether it counts; not if the step is skipped.

        Raises:
            As ``decompress``; in a ``dense_step``, with the step's last layer.
        """
        step = self._step
        if name not in step.arrived or name in step.settled:
            raise DLSError(f"layer {name!r}: reduced, but not on its way")
        if name in step.gradients:
            raise DLSError(f"layer {name!r}: reduced, but it was compressed")
        if not self.dense_step:
            self._check_arrived()
        elif reduced is not None:
            backend = self._backends[name]
            if not backend.finite(reduced):
                before = step.refused.where if step.refused else []
                step.refused = NonFiniteGradientError([*before, (name, None)])
            elif self.memory.controller.measures_now and name in self._layers:
                step.whole[name] = backend.histogram(reduced)
        counts = step.refused is None
        with Uninterrupted():
            self._settled(name)
        return counts

    def _settle(self, name: str, out: Array, scale: float) -> None:
        """Books what was sent of a layer and what came in; of one that is left out, the latter."""
        step, (bucket, position) = self._step, self.routing.position(name)
        backend, residual = self._backends[name], self.residuals[name]
        received = [payload.entries(position) for payload in step.received[bucket]]
        if name in step.left_out:
            nothing, layer = np.empty(0, np.uint32), self._layers[name]
            unused = backend.zeros(layer.size, layer.work_dtype)
            backend.settle(unused, unused, nothing, None, received, scale, out)
            return
        found = step.found[name]
        assert found is not None  # or the step would have been refused
        kept = step.kept[bucket][position]
        gradient = step.gradients[name]
        self._writing = f"residuals of layer {name!r}"
        backend.settle(residual, gradient, found.indices, kept, received, scale, out)
        if self.memory.baseline is not None:
            self.memory.baseline.take_note(name, residual, found.values)
        self._writing = None

    # The end of a step --------------------------------------------------------------------------

    def abandon(self) -> dict[int, np.ndarray]:
        """Gives the step in progress up: residuals and velocities are as they were before it.

        If some layer's sum has been written already, other ranks count the step as one that was
        made; so it is brought to its end, from what has come in.  If it is one that is skipped, it
        is skipped.  (In a ``dense_step`` nothing is written before the end.)

        Returns:
            Payloads to be sent, by bucket, of those that were not sent: they tell the other ranks,
            who may be waiting for them.
        """
        step, farewell = self._step, dict[int, np.ndarray]()
        if not step.arrived:
            return farewell
        if self._writing is not None:
            self._forget_step()
        elif step.settled and not self.dense_step:
            self._bring_to_end(step)
        else:
            if not self.memory.controller.dense:
                farewell = self._farewell()
            self._clock.abandon()
            self._forget_step()
        return farewell

    def _bring_to_end(self, step: Step) -> None:
        if step.refused is not None:
            self._end_refused(step)
            return
        for name in sorted(step.arrived - step.settled):
            with Uninterrupted():
                if name in step.gradients:
                    layer = self._layers[name]
                    out = self._backends[name].zeros(layer.size, layer.work_dtype)
                    self._settle(name, out, 1.0)
                self._settled(name)

    def _farewell(self) -> dict[int, np.ndarray]:
        own_k = self.memory.baseline is not None
        return {
            number: pack_abandoned(
                bucket, 0 * self._k_of(number) if own_k else self._k_of(number), self._clock.now
            )
            for number, bucket in enumerate(self.routing.buckets)
            if number not in self._step.sent
            if number in self._step.begun or not self.routing.members[number] <= self.missed
        }

    def _check_arrived(self) -> None:
        """Before the first change: is everything there, and good?"""
        step = self._step
        if step.settled:
            return
        if missing := set(step.begun) - step.received.keys():
            raise DLSError(f"decompressed before buckets {sorted(missing)} were received")
        step.untouched = self.untouched = self._absent_everywhere()
        if not (where := step.layers_that_say(NOT_FINITE)):
            return
        step.refused = NonFiniteGradientError(where)
        if self.config.nonfinite == "raise":
            self._forget_step()
            raise step.refused
        self._refused = True

    def _absent_everywhere(self) -> frozenset[str]:
        said = Counter(name for name, _ in self._step.layers_that_say(ABSENT))
        return frozenset(name for name, ranks in said.items() if ranks == self.world_size)

    def _settled(self, name: str) -> None:
        step = self._step
        step.settled.add(name)
        if len(step.settled) < len(step.arrived):
            return
        if step.refused is not None:
            self._end_refused(step)
            return
        everyone = frozenset(layer.name for layer in self.plan.layers)
        self.missed = everyone - step.arrived
        self._step = Step(self.routing)
        self._writing = "velocities and ratios"
        self.last_step = end_step(self.memory, self._recorder, step)
        self._writing = None
        self._clock.start_step()

    def _end_refused(self, step: Step) -> None:
        assert step.refused is not None
        self._forget_step()
        if self.config.nonfinite == "raise":
            raise step.refused
        self._refused = True
        self.skipped += 1
        if self.rank == 0:
            log.skipped(self.skipped, step.refused.where)

    def _forget_step(self) -> None:
        self._step = Step(self.routing)
        self.memory.correction.forget()

    def _check_sound(self) -> None:
        """Refuses to go on from what an error has left half written."""
        if self._writing is not None:
            raise DLSError(
                f"an error came while {self._writing} were being written, so what this rank "
                "remembers cannot be used: load a saved state on all ranks, or begin anew"
            )

    def _k_of(self, bucket: int) -> np.ndarray:
        k: np.ndarray = self.k[self.routing.rows[bucket]]
        return k

    def _find(self, name: str, k: int) -> None:
        self._step.k[name] = k
        found = self._backends[name].find(
            self.residuals[name],
            self._step.gradients[name],
            max(k, 1),
            self.memory.thresholds[name],
        )
        if isinstance(found, Future):
            assert self.memory.baseline is None  # these strategies look at residuals, on the host
            self._step.futures[name] = found
        else:
            self._heard_of(name, found)

    def _heard_of(self, name: str, result: Any) -> None:
        """Takes the result of ``find``, or of whether a layer that goes dense is finite."""
        step = self._step
        if name in step.gradients:
            found = result
            step.found[name] = found if step.k[name] or found is None else nothing_found(found)
        elif not result:
            step.not_finite.add(name)

    # Between steps ------------------------------------------------------------------------------

    @property
    def loss_scale(self) -> float:
        """What residuals and velocities are multiplied by."""
        return self.memory.loss_scale

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
        self.memory.scale_to(loss_scale)

    def agreed(self) -> np.ndarray:
        """Step and ratios, int64, which rank 0 hands to the others."""
        return self.memory.controller.state()

    def agree(self, agreed: np.ndarray) -> None:
        """Takes over rank 0's ``agreed()``, before the first step of all ranks together."""
        self.memory.agree(agreed)
        self._clock.start_step()

    def announce(self) -> None:
        """Logs what will happen, on rank 0."""
        if self.rank == 0:
            log.started(self.plan, self.routing, self.k.tolist(), self.world_size)

    def inherit(self, other: Session, factor: float = 1.0) -> None:
        """Takes over what another session of the same model remembers: see ``Memory.inherit``."""
        other._check_sound()
        self.memory.inherit(other.memory, factor)
        self.skipped, self.last_step = other.skipped, other.last_step
        self.marks_skipped = other.marks_skipped

    def state_dict(self) -> dict[str, Any]:
        """This rank's training state: plain values and arrays (the large ones are not copied).

        In a step that gathers, the state is that of before the step.

        Raises:
            DLSError: some layers of the step in progress have been settled and others not.
        """
        if self._step.settled and self._step.refused is None:
            raise DLSError(
                "state_dict() while gradients are being written: call it after optimizer.step(), "
                "or after abandon_step()"
            )
        self._check_sound()
        return self.memory.state()

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Whether a saved state fits: see ``Memory.check``."""
        self.memory.check(state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a saved state, copying it; a step in progress is forgotten.

        Raises:
            StateMismatchError: see ``Memory.check``; nothing has changed then.
        """
        state = self.memory.check(state)
        self._forget_step()
        self._writing = "loaded residuals"
        self.memory.load(state)
        self._writing = None
        self._clock.start_step()
