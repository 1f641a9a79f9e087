"""Between the halves of a step, where owners add up: see ``docs/scale.md``, "Which exchange when".

When a bucket is complete, each rank that sends it (where ranks are grouped: one of each group, once
its group's gradients are added up) sends every owner what it has found of the owner's region.  The
owner, one of these ranks, adds that up, rank by rank, and hands out the largest sums.  So all ranks
get the same sums, which are added up in one place.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from itertools import pairwise
from time import perf_counter
from typing import Any

import numpy as np

from hvd_dls.core.session.averaging import Averaging
from hvd_dls.core.session.gathering import Farewell
from hvd_dls.core.session.owners import Merged, Owners
from hvd_dls.core.wire.cutting import Cut, cut_out, put_together
from hvd_dls.core.wire.headers import headers_in, split, told_around
from hvd_dls.core.wire.layout import ABSENT, NOT_FINITE, SENT, Abandoned
from hvd_dls.core.wire.pack import pack, pack_abandoned
from hvd_dls.core.wire.payload import Payloads, Told
from hvd_dls.core.wire.refused import pack_refused, take_names
from hvd_dls.core.wire.strips import pieces_of
from hvd_dls.core.wire.unpack import unpack
from hvd_dls.errors import PayloadError


class Owning(Averaging):
    """Has owners add up what ranks send them: see ``Session``.

    A bucket's owners are the ranks that send it, in this order; without groups, all ranks.
    """

    @property
    def owners(self) -> Owners | None:
        """With exchange="sparse_allreduce", who owns what, and what this rank keeps of its own."""
        return self.memory.owners

    @property
    def staged(self) -> bool:
        """Whether something is to happen to a bucket before its payloads are gathered."""
        return self.grouped or self.owners is not None

    def _total(self, bucket: int) -> int:
        """Sums that all owners of a bucket hand out."""
        return int(self._k_of(bucket).sum())

    def ready(self) -> list[int]:
        """As ``Averaging.ready``: buckets whose sums are there."""
        step = self._step
        if self.owners is None:
            return super().ready()
        return sorted(step.collected - step.sent.keys())

    def to_scatter(self) -> list[int]:
        """Buckets that this rank ``sends`` and that need not be waited for: scatter ``parts``."""
        step = self._step
        if self.owners is None:
            return []
        if not self.grouped:
            return step.ready()
        added = sorted(step.added_up - step.scattered.keys())
        return [bucket for bucket in added if self.sends(bucket)]

    def parts(self, bucket: int) -> list[np.ndarray]:
        """What this rank sends the owners of a bucket: uint8, a part for each, in their order.

        Entries for which an owner has no room stay in the residual: the smallest.  If a rank of its
        group has given the step up, or is in another one, that is what it says.  Waits for devices
        that are still working on the bucket.

        Args:
            bucket: one that is ``to_scatter``, or without groups ``unfinished``.
        """
        owners = self._required_owners()
        step, begun = self._step, perf_counter()
        room = owners.room(bucket, self._total(bucket))
        why = step.abandoned.get(bucket)
        if why is not None:
            parts = self._abandoned_parts(bucket, room, why)
            step.scattered[bucket] = sum(map(len, parts))
            return parts
        for name in step.working_on(bucket):
            self._heard_of(name, step.futures[name].result())
            del step.futures[name]
        strip = owners.strip(bucket, room, handed_out=False)
        dealing, layers = owners.dealings[bucket], self.routing.buckets[bucket].layers
        cut = cut_out(dealing, [step.found.get(layer.name) for layer in layers], room)
        status = _status(step.found.get(layer.name, ABSENT) for layer in layers)
        watched = step.status_of_watched(bucket)
        written = strip.write(
            cut.entries, cut.indices, cut.values, status[dealing.layers], watched, self._clock.now
        )
        self._note_sent(bucket, cut, written.kept)
        self._close(bucket)
        step.scattered[bucket] = len(written.payloads)
        ends = strip.bounds.tolist()
        parts = [written.payloads[i:j] for i, j in pairwise(ends)]
        self.watch.seconds["pack"] += perf_counter() - begun
        return parts

    def _required_owners(self) -> Owners:
        assert self.owners is not None, "there are none without exchange='sparse_allreduce'"
        return self.owners

    def _abandoned_parts(
        self, bucket: int, room: np.ndarray, why: Abandoned = Abandoned.GIVEN_UP
    ) -> list[np.ndarray]:
        """What tells a bucket's owners that this rank sends them nothing, and why."""
        regions, now = self._required_owners().regions[bucket], self._clock.now
        return [
            pack_abandoned(region.sent, n, now, why)
            for region, n in zip(regions, room.tolist(), strict=True)
        ]

    def _note_sent(self, bucket: int, cut: Cut, rounding: np.ndarray | None) -> None:
        """Has the step know what was sent of each layer, where some may have found no room.

        Args:
            bucket: its number.
            cut: what was sent.
            rounding: (K,) what rounding to 16 bits left of it.
        """
        step, of, all_sent = self._step, self.routing.buckets[bucket], len(cut.places) == cut.found
        step.kept[bucket] = [None] * len(of.layers)
        if all_sent and rounding is None:
            return
        stays = np.zeros(cut.found, bool)
        stays[cut.places] = True
        left = np.zeros(cut.found, cut.values.dtype)
        if rounding is not None:
            left[cut.places] = rounding
        start = 0
        for position, layer in enumerate(of.layers):
            found = step.found.get(layer.name)
            if found is None:
                continue
            start, stop = start + len(found.indices), start
            own = slice(stop, start)
            if not all_sent:
                there = stays[own]
                step.found[layer.name] = found._replace(
                    indices=found.indices[there], values=found.values[there]
                )
            if rounding is not None:
                step.kept[bucket][position] = left[own][stays[own]]

    def _farewell_of(self, buckets: Collection[int]) -> dict[int, Farewell]:
        owners, step, farewell = self.owners, self._step, super()._farewell_of(buckets)
        if owners is None:
            return farewell
        for bucket, last in farewell.items():
            if not self.sends(bucket):
                continue
            total, parts, payload = self._total(bucket), None, None
            if bucket not in step.scattered:
                parts = self._abandoned_parts(bucket, owners.room(bucket, total))
            if bucket not in step.sent:
                own, share = owners.own(bucket).handed_out, owners.share(bucket, total)
                payload = pack_abandoned(own, share, self._clock.now)
            farewell[bucket] = last._replace(parts=parts, payload=payload)
        return farewell

    def collected(self, bucket: int, total: np.ndarray) -> None:
        """Takes what all senders of a bucket sent this one of its region, and adds it up.

        Args:
            bucket: its number.
            total: uint8, all their parts in rank order.

        Where some of them are in another step, or have given this one up, that is what this rank
        hands out; ``receive`` raises it then.

        Raises:
            PayloadError: they are not this bucket's; ``payload`` tells the others.
        """
        owners, senders = self._required_owners(), self.routing.senders[bucket]
        step, begun, part = self._step, perf_counter(), owners.own(bucket).sent
        room = int(owners.room(bucket, self._total(bucket))[owners.own_number])
        now, merged = self._clock.now, None
        try:
            payloads = unpack(part, room, total, senders)
            told = payloads.told()
            if payloads.all_of(now):
                merged = owners.merge(bucket, payloads, self._total(bucket))
        except PayloadError:
            told, _ = headers_in(part, total)  # ranks in other steps send other numbers of entries
            if len(told) != len(senders) or all(x.clock == now and not x.abandoned for x in told):
                step.abandoned[bucket] = Abandoned.OUT_OF_STEP  # what ``payload`` tells the others
                raise
        if merged is not None:
            step.merged[bucket] = merged
        else:
            step.told[bucket] = dict(zip(senders, told, strict=True))
            gone = any(x.abandoned == Abandoned.GIVEN_UP for x in told)
            step.abandoned[bucket] = Abandoned.GIVEN_UP if gone else Abandoned.OUT_OF_STEP
        step.collected.add(bucket)
        self.watch.seconds["unpack"] += perf_counter() - begun

    def payload(self, bucket: int) -> np.ndarray:
        """What this rank sends to all: of a bucket or, with owners, of its own region of it."""
        owners, step = self.owners, self._step
        if owners is None:
            return super().payload(bucket)
        begun, part, now = perf_counter(), owners.own(bucket).handed_out, self._clock.now
        share = owners.share(bucket, self._total(bucket))
        why = step.abandoned.get(bucket)
        if why is not None:
            payload = pack_abandoned(part, share, now, why)
        else:
            payload = self._handed_out(bucket, step.merged[bucket])
        # Each of the other senders gets so much of this one.
        step.sent[bucket] = step.scattered[bucket] // self.groups.count + len(payload)
        self.watch.seconds["pack"] += perf_counter() - begun
        self.watch.sent()
        return payload

    def _handed_out(self, bucket: int, merged: Merged) -> np.ndarray:
        """What this owner tells all: its sums or, of a step that is refused, who is to blame."""
        owners, now = self._required_owners(), self._clock.now
        part, share = owners.own(bucket).handed_out, owners.share(bucket, self._total(bucket))
        if len(merged.said):
            return pack_refused(part, share, merged.status, merged.watched, merged.said, now)
        packed = pack(part, share, merged.pieces, merged.watched, now)
        self._step.rounding[bucket] = packed.kept
        return packed.payload

    def _taken_apart(self, bucket: int, gathered: np.ndarray) -> tuple[Payloads, dict[int, Told]]:
        owners = self.owners
        if owners is None:
            return super()._taken_apart(bucket, gathered)
        if heard := self._step.told.get(bucket, {}):
            self._check_clock(heard)  # who it was, and not only that the owners have heard of it
        senders, of_mates = self.routing.senders[bucket], dict[int, Told]()
        total, now = self._total(bucket), self._clock.now
        shares = owners.shares(bucket, total)
        strip = owners.strip(bucket, shares, handed_out=True)
        length = int(strip.bounds[-1])
        if self.grouped:
            mates, sender = self.groups.mates, senders[self.groups.own]
            of = self.routing.buckets[bucket]
            handed = split(of, total, gathered, len(mates), mates.index(sender), length)
            gathered = handed.payloads
            of_mates.update(zip((m for m in mates if m != sender), handed.told, strict=True))
        elif gathered.dtype != np.uint8 or len(gathered) != length:
            raise PayloadError(
                f"bucket {self.routing.buckets[bucket].name!r}: gathered {gathered.size} items of "
                f"{gathered.dtype}, expected {length} bytes; are all ranks in the same step?"
            )
        pieces, named = strip.read(gathered, now), set[tuple[str, int]]()
        if pieces is None:  # one by one, which tells what is wrong, or whose gradients are
            payloads = []
            for owner, (begin, end) in enumerate(pairwise(strip.bounds.tolist())):
                part, share = owners.regions[bucket][owner].handed_out, int(shares[owner])
                apart = take_names(part, share, gathered[begin:end], len(senders))
                payloads.append(unpack(part, share, apart.payload, [senders[owner]]))
                names = owners.names(bucket, owner)
                named |= {(names[number], rank) for number, rank in apart.where}
            told = {rank: each.told()[0] for rank, each in zip(senders, payloads, strict=True)}
            self._check_clock(of_mates | told)
            pieces = pieces_of(payloads)
        dealing = owners.dealings[bucket]
        return put_together(dealing, pieces, strip.sketched, sorted(named)), of_mates

    def _told_by_headers(self, bucket: int, gathered: np.ndarray) -> dict[int, Told]:
        if self.owners is None:
            return super()._told_by_headers(bucket, gathered)
        if not self.grouped:
            return {}  # the owners have heard of it, and their parts told
        senders, mates = self.routing.senders[bucket], self.groups.mates
        sender = senders[self.groups.own]
        told = told_around(
            self.routing.buckets[bucket],
            self.owners.regions[bucket][0].handed_out,
            gathered,
            len(mates),
            mates.index(sender),
        )
        if len(told) == len(mates):  # the first payload is that of the first owner
            others = [mate for mate in mates if mate != sender]
            return dict(zip([senders[0], *others], told, strict=True))
        return super()._told_by_headers(bucket, gathered)


def _status(found: Iterable[Any]) -> np.ndarray:
    """What is told of layers of which this was found: uint8."""
    told = [NOT_FINITE if x is None else ABSENT if x is ABSENT else SENT for x in found]
    return np.array(told, np.uint8)
