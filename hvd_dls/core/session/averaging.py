"""Between the halves of a step, where ranks are grouped: each group averages its gradients first.

When a bucket is complete, each rank's gradients, with a few counts behind them, are added up inside
the group, densely.  One rank of the group selects from the sum and sends a payload to those that do
of the other groups; what comes in it hands on inside the group.  Each of the others tells there, by
a header alone, in which step it is.  Without groups nothing of this happens.
"""

from __future__ import annotations

from time import perf_counter

import numpy as np

from hvd_dls.core.selection.passes_numpy import widened
from hvd_dls.core.session.gathering import CLOCK, Gathering
from hvd_dls.core.wire.headers import pack_header
from hvd_dls.core.wire.layout import ABSENT, NOT_FINITE, Abandoned, Status
from hvd_dls.core.wire.pack import pack_abandoned

_CLOCK_MODULO = 1 << 12


class Averaging(Gathering):
    """Averages gradients inside the group: see ``Session``."""

    @property
    def grouped(self) -> bool:
        """Whether buckets are to be added up inside the group before they are sent."""
        return not self.groups.trivial

    def sends(self, bucket: int) -> bool:
        """Whether this rank sends a bucket: to the others that do, one of each group."""
        return self.routing.sends[bucket]

    def ready(self) -> list[int]:
        """Buckets that are complete, have not been sent, and need not be waited for: send them."""
        step = self._step
        if not self.grouped:
            return step.ready()
        added = sorted(step.added_up - step.sent.keys())
        return [bucket for bucket in added if self.sends(bucket)]

    def to_add_up(self) -> list[int]:
        """Buckets that are complete: add their ``contribution`` up inside the group."""
        return self._step.ready() if self.grouped else []

    def contribution(self, bucket: int) -> np.ndarray:
        """What this rank adds to its group's sum of a bucket.

        Args:
            bucket: one that is ``to_add_up`` or ``unfinished``; no layer of it can come in after.

        Returns:
            (n,) of the bucket's work dtype: all gradients, weighted so that the sum is the group's
            average (see ``Groups.weight``); for each layer, then for each watched one, whether it
            takes part; for each watched one whether it is not finite; and this rank's clock.
        """
        step, of, begun = self._step, self.routing.buckets[bucket], perf_counter()
        own = self.no_contribution(bucket)
        weight = own.dtype.type(self.groups.weight)
        there, not_finite, clock = self._counts(bucket, own)
        clock[:] = self._own_clock()
        for position, layer in enumerate(of.layers):
            if layer.name not in step.arrived or layer.name in step.stayed_away:
                continue
            part = own[of.offsets[position] : of.offsets[position + 1]]
            gradient = step.gradients[layer.name]
            factor = self.memory.correction.factor(layer.name, gradient, self.loss_scale)
            with np.errstate(all="ignore"):
                np.multiply(widened(gradient), weight * own.dtype.type(factor), out=part)
            self.memory.with_leftover(layer.name, part)
            there[position] = 1
        for position, name in enumerate(of.watched):
            if name in step.arrived and name not in step.stayed_away:
                there[len(of.layers) + position] = 1
                not_finite[position] = name in step.not_finite
        self._close(bucket)
        if len(self.groups.mates) > 1:
            step.host_bytes += own.nbytes
        self.watch.seconds["average"] += perf_counter() - begun
        return own

    def added_up(self, bucket: int, total: np.ndarray) -> None:
        """Takes the sum of the group's contributions; the bucket's owner selects from it.

        Args:
            bucket: its number.
            total: (n,) as ``contribution``; not to be changed before the step ends.
        """
        step, of = self._step, self.routing.buckets[bucket]
        there, not_finite, clock = self._counts(bucket, total)
        mates = len(self.groups.mates)
        if (clock != [mates * each for each in self._own_clock()]).any():
            all_there = clock[CLOCK.index("ranks")] == mates
            step.abandoned[bucket] = Abandoned.OUT_OF_STEP if all_there else Abandoned.GIVEN_UP
        for position, layer in enumerate(of.layers):
            name = layer.name
            if not there[position]:
                if name in step.arrived:
                    step.left_out.add(name)
                continue
            step.left_out.discard(name)
            if self.routing.sends[bucket]:
                self._select(name, total[of.offsets[position] : of.offsets[position + 1]])
            elif name in step.stayed_away:
                step.gradients[name] = total[:0]  # it is compressed, if not by this rank
        told: dict[str, Status] = {}
        for position, name in enumerate(of.watched):
            if not there[len(of.layers) + position]:
                told[name] = ABSENT
            elif not_finite[position]:
                told[name] = NOT_FINITE
        step.watched_in_group[bucket] = told
        step.added_up.add(bucket)

    def _counts(self, bucket: int, array: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Views: how many ranks have each layer; where how many are not finite; their clocks."""
        of = self.routing.buckets[bucket]
        layers = of.size + len(of.layers) + len(of.watched)
        return array[of.size : layers], array[layers : -len(CLOCK)], array[-len(CLOCK) :]

    def _own_clock(self) -> list[int]:
        """Small enough for sums to be exact."""
        now = self._clock.now
        return [1, now.step % _CLOCK_MODULO, now.attempt % _CLOCK_MODULO]

    def payload(self, bucket: int) -> np.ndarray:
        """What this rank sends of a bucket: uint8; as long as every other rank's if they agree.

        If a rank of its group has given the step up, or is in another one, that is what it says.
        Waits for devices that are still working on it.
        """
        why = self._step.abandoned.get(bucket)
        if why is None:
            return super().payload(bucket)
        of, k, now = self.routing.buckets[bucket], self._k_of(bucket), self._clock.now
        payload = pack_abandoned(of, k, now, why)
        self._step.sent[bucket] = len(payload)
        return payload

    def header(self, bucket: int) -> np.ndarray:
        """What this rank hands on of a bucket that another one ``sends``: uint8.

        To be called after ``contribution``.
        """
        capacity = int(self._k_of(bucket).sum())
        self._step.handed_on.add(bucket)
        header = pack_header(self.routing.buckets[bucket], capacity, self._clock.now)
        self._step.host_bytes += header.nbytes
        self.watch.sent()
        return header

    def hand_on(self, bucket: int, gathered: np.ndarray) -> np.ndarray:
        """What this rank hands on of a bucket that it ``sends``: what came in, as it came.

        Args:
            bucket: its number.
            gathered: uint8, all payloads in rank order.
        """
        self._step.handed_on.add(bucket)
        if len(self.groups.mates) > 1:
            self._step.host_bytes += gathered.nbytes
        return gathered
