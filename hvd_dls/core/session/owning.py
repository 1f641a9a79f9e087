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
from typing import Any, NamedTuple

import numpy as np

from hvd_dls.core.session.averaging import Averaging
from hvd_dls.core.session.gathering import Farewell
from hvd_dls.core.session.owners import Owners
from hvd_dls.core.wire.headers import headers_in, split, told_around
from hvd_dls.core.wire.layout import ABSENT, NOT_FINITE, SENT, Abandoned
from hvd_dls.core.wire.pack import pack, pack_abandoned
from hvd_dls.core.wire.payload import Payloads, Told, starts_of
from hvd_dls.core.wire.strips import Pieces, pieces_of
from hvd_dls.core.wire.unpack import unpack
from hvd_dls.errors import DLSError, PayloadError


class Sent(NamedTuple):
    """What a rank sends the owners of a bucket, piece by piece: S of them.

    Attributes:
        entries: (S,) of each.
        indices: (K,) uint32, in each piece from its own zero.
        values: (K,).
        layers: (S,) each one's layer, by its number in the bucket.
    """

    entries: np.ndarray
    indices: np.ndarray
    values: np.ndarray
    layers: np.ndarray


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
        room = owners.shares.room(bucket, self._total(bucket))
        why = step.abandoned.get(bucket)
        if why is not None:
            parts = self._abandoned_parts(bucket, room, why)
            step.scattered[bucket] = sum(map(len, parts))
            return parts
        for name in step.working_on(bucket):
            self._heard_of(name, step.futures[name].result())
            del step.futures[name]
        strip = owners.strip(bucket, room, handed_out=False)
        sent, stays = self._cut(bucket, owners, room)
        status = _status(
            step.found.get(x.name, ABSENT) for x in self.routing.buckets[bucket].layers
        )
        watched = step.status_of_watched(bucket)
        written = strip.write(
            sent.entries, sent.indices, sent.values, status[sent.layers], watched, self._clock.now
        )
        self._note_sent(bucket, stays, written.kept)
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

    def _cut(self, bucket: int, owners: Owners, room: np.ndarray) -> tuple[Sent, np.ndarray | None]:
        """What was found, cut into owners' pieces; and which of it is left, None for all.

        Raises:
            DLSError: indices do not ascend within their layer.
        """
        step, of = self._step, self.routing.buckets[bucket]
        there = [step.found.get(layer.name) for layer in of.layers]
        lengths = [0 if found is None else len(found.indices) for found in there]
        found = [x for x in there if x is not None]
        nothing = np.empty(0, of.layers[0].work_dtype)
        indices = np.concatenate([nothing.astype(np.uint32), *(x.indices for x in found)])
        values = np.concatenate([nothing, *(x.values for x in found)])
        numbers = indices + np.repeat(of.offsets[:-1], lengths)
        cuts = np.searchsorted(numbers, of.offsets)
        if (np.diff(cuts) != lengths).any() or (np.diff(numbers) <= 0).any():
            raise DLSError(f"bucket {of.name!r}: indices do not ascend within their layers")
        stays, edges = None, owners.edges(bucket)
        if len(left_out := _left_out(numbers, values, owners.shares.bounds[bucket], room)):
            stays = np.ones(len(numbers), bool)
            stays[left_out] = False
            numbers, values = numbers[stays], values[stays]
        entries = np.diff(np.searchsorted(numbers, edges.starts))
        own = (numbers - np.repeat(edges.starts[:-1], entries)).astype(np.uint32)
        return Sent(entries, own, values, edges.layers), stays

    def _note_sent(self, bucket: int, stays: np.ndarray | None, kept: np.ndarray | None) -> None:
        """Has the step know what was sent of each layer, where some may have found no room."""
        step, of = self._step, self.routing.buckets[bucket]
        step.kept[bucket] = [None] * len(of.layers)
        before = after = 0
        for position, layer in enumerate(of.layers):
            found = step.found.get(layer.name)
            if found is None:
                continue
            stop = before + len(found.indices)
            if stays is not None:
                own = stays[before:stop]
                found = found._replace(indices=found.indices[own], values=found.values[own])
                step.found[layer.name] = found
            before, begin = stop, after
            after += len(found.indices)
            if kept is not None:
                step.kept[bucket][position] = kept[begin:after]

    def _farewell_of(self, buckets: Collection[int]) -> dict[int, Farewell]:
        owners, step, farewell = self.owners, self._step, super()._farewell_of(buckets)
        if owners is None:
            return farewell
        for bucket, last in farewell.items():
            if not self.sends(bucket):
                continue
            total, parts, payload = self._total(bucket), None, None
            if bucket not in step.scattered:
                parts = self._abandoned_parts(bucket, owners.shares.room(bucket, total))
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
            PayloadError: they are not this bucket's.
        """
        owners, senders = self._required_owners(), self.routing.senders[bucket]
        step, begun, part = self._step, perf_counter(), owners.own(bucket).sent
        room = int(owners.shares.room(bucket, self._total(bucket))[owners.own_number])
        now, merged = self._clock.now, None
        try:
            payloads = unpack(part, room, total, senders)
            told = payloads.told()
            if payloads.all_of(now):
                merged = owners.merge(bucket, payloads, self._total(bucket))
        except PayloadError:
            told, _ = headers_in(part, total)  # ranks in other steps send other numbers of entries
            if len(told) != len(senders) or all(x.clock == now and not x.abandoned for x in told):
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
            merged = step.merged[bucket]
            packed = pack(part, share, merged.pieces, merged.watched, now)
            payload, step.rounding[bucket] = packed.payload, packed.kept
        # Each of the other senders gets so much of this one.
        step.sent[bucket] = step.scattered[bucket] // self.groups.count + len(payload)
        self.watch.seconds["pack"] += perf_counter() - begun
        self.watch.sent()
        return payload

    def _taken_apart(self, bucket: int, gathered: np.ndarray) -> tuple[Payloads, dict[int, Told]]:
        owners = self.owners
        if owners is None:
            return super()._taken_apart(bucket, gathered)
        if heard := self._step.told.get(bucket, {}):
            self._check_clock(heard)  # who it was, and not only that the owners have heard of it
        senders, of_mates = self.routing.senders[bucket], dict[int, Told]()
        total, now = self._total(bucket), self._clock.now
        shares = owners.shares.of(bucket, total)
        strip = owners.strip(bucket, shares, handed_out=True)
        length = int(strip.bounds[-1])
        if self.grouped:
            mates, sender = self.groups.mates, senders[self.groups.own]
            of = self.routing.buckets[bucket]
            apart = split(of, total, gathered, len(mates), mates.index(sender), length)
            gathered = apart.payloads
            of_mates.update(zip((m for m in mates if m != sender), apart.told, strict=True))
        elif gathered.dtype != np.uint8 or len(gathered) != length:
            raise PayloadError(
                f"bucket {self.routing.buckets[bucket].name!r}: gathered {gathered.size} items of "
                f"{gathered.dtype}, expected {length} bytes; are all ranks in the same step?"
            )
        pieces = strip.read(gathered, now)
        if pieces is None:  # one by one, which tells what is wrong
            payloads = [
                unpack(region.handed_out, share, gathered[begin:end], [rank])
                for rank, region, share, (begin, end) in zip(
                    senders,
                    owners.regions[bucket],
                    shares.tolist(),
                    pairwise(strip.bounds.tolist()),
                    strict=True,
                )
            ]
            told = {rank: each.told()[0] for rank, each in zip(senders, payloads, strict=True)}
            self._check_clock(of_mates | told)
            pieces = pieces_of(payloads)
        return self._joined(bucket, pieces, strip.first), of_mates

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

    def _joined(self, bucket: int, pieces: Pieces, first: np.ndarray) -> Payloads:
        """What all owners hand out of a bucket, as if one rank had sent it.

        Args:
            bucket: its number.
            pieces: of all owners.
            first: (P + 1,) each owner's first piece, and the number of all.
        """
        owners, of = self.owners, self.routing.buckets[bucket]
        assert owners is not None
        n, edges = len(of.layers), owners.edges(bucket)
        # A layer is not finite if a piece is not, else it is sent if a piece is.
        status = np.full(n, ABSENT, np.uint8)
        status[edges.layers[pieces.status == SENT]] = SENT
        status[edges.layers[pieces.status == NOT_FINITE]] = NOT_FINITE
        lengths = np.diff(pieces.starts)
        entries = np.zeros(n, np.int64)
        np.add.at(entries, edges.layers, lengths)
        bases, counts = _together(pieces, edges.layers, n)
        indices = pieces.indices + np.repeat(edges.begins, lengths).astype(np.uint32)
        self._step.of_regions[bucket] = (
            np.maximum.reduceat(pieces.bases, first[:-1]).astype(np.int64),
            np.add.reduceat(pieces.counts, first[:-1], axis=0),
        )
        return Payloads(
            pieces.headers[:1],
            pieces.watched[None],
            status[None],
            bases[None],
            counts[None],
            starts_of(entries[None]),
            [(indices, pieces.values)],
            from_owners=True,
        )


def _left_out(
    numbers: np.ndarray, values: np.ndarray, bounds: np.ndarray, room: np.ndarray
) -> np.ndarray:
    """Places of the smallest entries, of those owners that have no room for all.

    Args:
        numbers: (K,) ascending, of entries of the bucket.
        values: (K,).
        bounds: (P + 1,) of the owners' regions.
        room: (P,) entries.
    """
    cuts = np.searchsorted(numbers, bounds)
    over = np.diff(cuts) - room
    places = [np.empty(0, np.int64)]
    for owner in np.flatnonzero(over > 0).tolist():
        start, stop = cuts[owner : owner + 2].tolist()
        order = np.argsort(np.abs(values[start:stop]), kind="stable")
        places.append(start + order[: over[owner]])
    return np.concatenate(places)


def _status(found: Iterable[Any]) -> np.ndarray:
    """What is told of layers of which this was found: uint8."""
    told = [NOT_FINITE if x is None else ABSENT if x is ABSENT else SENT for x in found]
    return np.array(told, np.uint8)


def _together(pieces: Pieces, layers: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Sketches of pieces as one for each of n layers, from where all of them are known.

    Those of pieces that are not sent, or without counts, do not count.
    """
    counted = (pieces.status == SENT) & pieces.counts.any(axis=1)
    own, bases, counts = layers[counted], pieces.bases[counted], pieces.counts[counted]
    tops, window = np.zeros(n, np.int64), pieces.counts.shape[1]
    np.maximum.at(tops, own, bases.astype(np.int64))
    # What lies beyond the window is in its last bin, and stays in sight.
    moved = np.minimum(tops[own] - bases, window - 1)
    bins = np.arange(window) - moved[:, None]
    total, there = np.zeros((n, window), np.int64), bins >= 0
    np.add.at(total, (np.broadcast_to(own[:, None], bins.shape)[there], bins[there]), counts[there])
    return tops, total
