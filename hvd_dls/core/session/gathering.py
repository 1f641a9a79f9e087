"""The first half of a step: gradients come in, payloads go out, all ranks' payloads come in.

Nothing that outlives the step changes here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

from hvd_dls.core.selection.backend import Array, Future
from hvd_dls.core.selection.passes import nothing_found
from hvd_dls.core.session.base import SessionBase
from hvd_dls.core.session.interrupts import Uninterrupted
from hvd_dls.core.session.step import Step
from hvd_dls.core.wire.headers import headers_in, pack_header, split
from hvd_dls.core.wire.layout import ABSENT, Abandoned, payload_bytes
from hvd_dls.core.wire.pack import pack, pack_abandoned
from hvd_dls.core.wire.payload import Payloads, Told
from hvd_dls.core.wire.unpack import unpack, unpack_varying
from hvd_dls.errors import DLSError, PayloadError

# What follows the counts in a contribution: how many ranks take part, and the sums of their clocks.
CLOCK = ("ranks", "step", "attempt")


class Farewell(NamedTuple):
    """What tells the other ranks, of a bucket, that this one has given the step up.

    Attributes:
        contribution: to be added up inside the group, or None.
        parts: for the bucket's owners, or None.
        payload: for all ranks that send, or None.
        header: to be handed on inside the group, or None.
    """

    contribution: np.ndarray | None
    parts: list[np.ndarray] | None
    payload: np.ndarray | None
    header: np.ndarray | None


class Gathering(SessionBase):
    """Gathers a step's gradients and payloads: see ``Session``."""

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
        self._check_in(name)
        if self.groups.trivial:
            self._select(name, gradient)
        else:
            self._step.gradients[name] = gradient  # until those of the group are added up
        return self._arrive(name)

    def _select(self, name: str, gradient: Array) -> None:
        begun = perf_counter()
        correction, baseline = self.memory.correction, self.memory.baseline
        if correction.active:
            limited = not self.groups.trivial  # by each rank, before they were averaged
            gradient = correction.apply(name, gradient, self.loss_scale, limited)
        self._step.gradients[name] = gradient
        if baseline is None:
            self._find(name, self.memory.controller.k_of(name))
        elif not baseline.needs_all:
            k = baseline.k_of(name, self.residuals[name], gradient, self.loss_scale)
            self._find(name, k)
        self.watch.seconds["find"] += perf_counter() - begun

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
        self._check_in(name)
        if isinstance(finite, Future):
            self._step.futures[name] = finite
        elif not finite:
            self._step.not_finite.add(name)
        return self._arrive(name)

    def leave_out(self, name: str) -> int | None:
        """Takes note of a layer that takes no part on this rank: it is frozen, for example.

        Nothing is sent of it, and its residual and velocity stay as they are.  In the end it goes
        through ``decompress`` or ``accept`` like the others: other ranks may have sent something.

        Returns:
            As ``compress``.

        Raises:
            DLSError: the layer has been in this step already.
        """
        self._check_in(name, left_out=True)
        return self._arrive(name, left_out=True)

    def _check_in(self, name: str, left_out: bool = False) -> None:
        if not self.in_step:
            self._begin()
        self._step.check(name, left_out)

    def _arrive(self, name: str, left_out: bool = False) -> int | None:
        """Takes a layer in when all that is needed of it is there.

        If Ctrl-C comes before, the layer has not come in, and can come once more.
        """
        step, bucket = self._step, self.routing.bucket_of(name)
        if self.memory.controller.dense:
            bucket = None
        if bucket is not None:
            step.begin(bucket)
        if self.in_step and not left_out:
            step.arrive(name)
        else:
            with Uninterrupted():
                self._rounds[-1] += not self.in_step
                (step.stay_away if left_out else step.arrive)(name)
        return bucket if bucket is not None and step.is_complete(bucket) else None

    @property
    def complete(self) -> bool:
        """Whether all layers have come in, and so all buckets have been or can be sent."""
        return self._step.complete

    def future_of(self, name: str) -> Future[Any]:
        """What a device is still working on, of a layer that has come in and was not sent yet."""
        return self._step.futures[name]

    @property
    def all_received(self) -> bool:
        """Whether nothing is to be sent or received any more, of what has come in so far."""
        return self._step.all_received

    def unfinished(self) -> list[int]:
        """Buckets with some layers in this step that have not been closed: send them now."""
        return [bucket for bucket in self._step.begun if bucket not in self._step.closed]

    def payload(self, bucket: int) -> np.ndarray:
        """What this rank sends of a bucket: uint8; as long as every other rank's if they agree.

        Waits for devices that are still working on it.
        """
        step, of, begun = self._step, self.routing.buckets[bucket], perf_counter()
        for name in step.working_on(bucket):
            self._heard_of(name, step.futures[name].result())
            del step.futures[name]  # not before: waiting may be interrupted
        if self.memory.baseline is not None and self.memory.baseline.needs_all:
            there = {n: g for n, g in step.gradients.items() if n in step.arrived}
            together = self.memory.baseline.k_together(self.residuals, there)
            for name, k in together.items():
                self._find(name, k)
        found_at = perf_counter()
        found = [step.found.get(x.name, ABSENT) for x in of.layers]
        if self.memory.baseline is None:
            k_of_layers = self._k_of(bucket)
        else:  # this rank's own; of a layer that is not finite or absent, nothing
            k_of_layers = np.array(
                [0 if f is None or f is ABSENT else len(f.indices) for f in found]
            )
        watched = step.status_of_watched(bucket)
        packed = pack(of, k_of_layers, found, watched, self._clock.now)
        step.kept[bucket] = packed.kept
        step.sent[bucket] = len(packed.payload)
        self._close(bucket)
        self.watch.seconds["find"] += found_at - begun
        self.watch.seconds["pack"] += perf_counter() - found_at
        self.watch.sent()
        return packed.payload

    def receive(self, bucket: int, gathered: np.ndarray) -> None:
        """Takes what all ranks sent of a bucket.

        Args:
            bucket: its number.
            gathered: uint8, all payloads in rank order; where ranks are grouped, what those of this
                group handed on.

        Raises:
            PayloadError: the payloads are not this bucket's.
            RanksDisagreeError: some rank has abandoned this step, or is in another one: ``abandon``
                it here, too.
        """
        begun = perf_counter()
        try:
            payloads, told = self._taken_apart(bucket, gathered)
        except PayloadError:
            # Ranks in other steps send other numbers of entries.
            self._check_clock(self._told_by_headers(bucket, gathered))
            raise
        if told:
            self._check_clock(told)
        self._step.received[bucket] = payloads
        self.watch.seconds["unpack"] += perf_counter() - begun

    def _taken_apart(self, bucket: int, gathered: np.ndarray) -> tuple[Payloads, dict[int, Told]]:
        """A bucket's payloads, and what ranks tell, if it must be looked at."""
        of, k, senders = (
            self.routing.buckets[bucket],
            self._k_of(bucket),
            self.routing.senders[bucket],
        )
        told: dict[int, Told] = {}
        if self.memory.baseline is not None:
            payloads = unpack_varying(of, gathered, self.world_size)
        elif self.groups.trivial:
            payloads = unpack(of, k, gathered, senders)
        else:
            mates, owner = self.groups.mates, senders[self.groups.own]
            length = self.groups.count * payload_bytes(of, int(k.sum()))
            apart = split(of, int(k.sum()), gathered, len(mates), mates.index(owner), length)
            payloads = unpack(of, k, apart.payloads, senders)
            told.update(zip((m for m in mates if m != owner), apart.told, strict=True))
        if told or not payloads.all_of(self._clock.now):
            told |= zip(senders, payloads.told(), strict=True)
        return payloads, told

    def _told_by_headers(self, bucket: int, gathered: np.ndarray) -> dict[int, Told]:
        """What ranks tell of a bucket whose payloads do not fit; nothing if they are none."""
        payloads, alone = headers_in(self.routing.buckets[bucket], gathered)
        senders, mates = self.routing.senders[bucket], self.groups.mates
        others = [mate for mate in mates if mate != senders[self.groups.own]]
        if (len(payloads), len(alone)) == (len(senders), len(others)):
            return dict(zip([*senders, *others], [*payloads, *alone], strict=True))
        if (len(payloads), len(alone)) == (0, len(mates)):  # the one that sends has given up
            return dict(zip(mates, alone, strict=True))
        return {}

    def _check_clock(self, told: Mapping[int, Told]) -> None:
        self._step.given_up |= any(x.abandoned == Abandoned.GIVEN_UP for x in told.values())
        self._clock.check(told)

    def _farewell(self) -> dict[int, Farewell]:
        """What tells the other ranks that this one has given the step up.

        Whoever hears of it gives the step up, too.  So each rank has sent one payload of every
        bucket in the end, and those of the next attempt meet each other.
        """
        step, routing = self._step, self.routing
        if not step.arrived or self.memory.controller.dense:
            return {}
        open_ones = [n for n in range(len(routing.buckets)) if self._owes(n)]
        waits = [n in step.begun or not routing.members[n] <= self.missed for n in open_ones]
        if not (step.given_up or any(waits)):
            return {}  # nobody waits for these
        return self._farewell_of(open_ones)

    def _farewell_of(self, buckets: Collection[int]) -> dict[int, Farewell]:
        """What this rank has not sent of these buckets, if it is to send nothing else of them."""
        step, routing, own_k = self._step, self.routing, self.memory.baseline is not None
        farewell, now, grouped = dict[int, Farewell](), self._clock.now, not self.groups.trivial
        for n in buckets:
            bucket, k = routing.buckets[n], 0 * self._k_of(n) if own_k else self._k_of(n)
            unsent = routing.sends[n] and n not in step.sent
            farewell[n] = Farewell(
                self.no_contribution(n) if grouped and n not in step.closed else None,
                None,
                pack_abandoned(bucket, k, now) if unsent else None,
                pack_header(bucket, int(k.sum()), now, Abandoned.GIVEN_UP) if grouped else None,
            )
        return farewell

    def _owes(self, bucket: int) -> bool:
        """Whether other ranks may wait for something of a bucket that this one has not sent."""
        step = self._step
        return bucket not in (step.sent if self.groups.trivial else step.handed_on)

    def no_contribution(self, bucket: int) -> np.ndarray:
        """What a rank adds inside its group (see ``Averaging``) that has given the step up."""
        of = self.routing.buckets[bucket]
        size = of.size + len(of.layers) + 2 * len(of.watched) + len(CLOCK)
        return np.zeros(size, of.layers[0].work_dtype)

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
