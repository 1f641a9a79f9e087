"""Between the halves of a step, where owners add up: see ``docs/scale.md``, "Which exchange when".

When a bucket is complete, each rank sends every owner what it has found of the owner's region.  The
owner adds that up, rank by rank, and hands out the largest sums.  So all ranks get the same sums,
which are added up in one place.
"""

from __future__ import annotations

from collections.abc import Collection
from time import perf_counter
from typing import Any

import numpy as np

from hvd_dls.core.session.averaging import Averaging
from hvd_dls.core.session.gathering import Contribution, Farewell
from hvd_dls.core.session.owners import Owners, Piece
from hvd_dls.core.wire.headers import headers_in
from hvd_dls.core.wire.layout import ABSENT, NOT_FINITE, SENT, Abandoned, payload_bytes
from hvd_dls.core.wire.pack import pack, pack_abandoned
from hvd_dls.core.wire.payload import Payloads, Told, starts_of
from hvd_dls.core.wire.unpack import unpack
from hvd_dls.errors import PayloadError


class Owning(Averaging):
    """Has owners add up what ranks send them: see ``Session``."""

    @property
    def owners(self) -> Owners | None:
        """With exchange="sparse_allreduce", what this rank owns."""
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
        return sorted(step.added_up - step.sent.keys())

    def to_add_up(self) -> list[int]:
        """Buckets that are complete: send their ``contribution`` to their owners."""
        return super().to_add_up() if self.owners is None else self._step.ready()

    def contribution(self, bucket: int) -> Contribution:
        """What this rank sends the owners of a bucket: uint8, a part for each, in rank order.

        Entries for which an owner has no room stay in the residual: the smallest.  Waits for
        devices that are still working on the bucket.
        """
        owners = self.owners
        if owners is None:
            return super().contribution(bucket)
        step, begun = self._step, perf_counter()
        for name in step.working_on(bucket):
            self._heard_of(name, step.futures[name].result())
            del step.futures[name]
        room = owners.shares.room(bucket, self._total(bucket)).tolist()
        watched, now = step.status_of_watched(bucket), self._clock.now
        parts, kept = [], list[list[np.ndarray | None]]()
        cut = self._cut(bucket, owners)
        for region, pieces, capacity in zip(owners.regions[bucket], cut, room, strict=True):
            pieces = _fitted(pieces, capacity)
            of_owner = watched if region.sent.watched else {}
            packed = pack(region.sent, capacity, pieces, of_owner, now)
            parts.append(packed.payload)
            kept.append(packed.kept)
            cut[len(kept) - 1] = pieces
        self._note_sent(bucket, owners, cut, kept)
        self._close(bucket)
        step.scattered[bucket] = sum(map(len, parts))
        self.watch.seconds["pack"] += perf_counter() - begun
        return parts

    def _cut(self, bucket: int, owners: Owners) -> list[list[Any]]:
        """What was found of each owner's pieces, or None, or ABSENT, as for ``pack``."""
        step, of = self._step, self.routing.buckets[bucket]
        cut: list[list[Any]] = []
        for region in owners.regions[bucket]:
            pieces: list[Any] = []
            sizes = np.diff(region.sent.offsets)
            for layer, begin, size in zip(region.layers, region.begins, sizes, strict=True):
                found = step.found.get(of.layers[layer].name, ABSENT)
                if found is None or found is ABSENT:
                    pieces.append(found)
                    continue
                first, last = np.searchsorted(found.indices, [begin, begin + size])
                indices = found.indices[first:last] - np.uint32(begin)
                pieces.append(Piece(indices, found.values[first:last]))
            cut.append(pieces)
        return cut

    def _note_sent(
        self,
        bucket: int,
        owners: Owners,
        cut: list[list[Any]],
        kept: list[list[np.ndarray | None]],
    ) -> None:
        """Has the step know what was sent of each layer, where some may have found no room."""
        step, of = self._step, self.routing.buckets[bucket]
        indices: list[list[np.ndarray]] = [[] for _ in of.layers]
        values: list[list[np.ndarray]] = [[] for _ in of.layers]
        rounding: list[list[np.ndarray | None]] = [[] for _ in of.layers]
        for region, pieces, left in zip(owners.regions[bucket], cut, kept, strict=True):
            for layer, begin, piece, rest in zip(
                region.layers.tolist(), region.begins, pieces, left, strict=True
            ):
                if isinstance(piece, Piece):
                    indices[layer].append(piece.indices + np.uint32(begin))
                    values[layer].append(piece.values)
                    rounding[layer].append(rest)
        step.kept[bucket] = [None] * len(of.layers)
        for position, layer in enumerate(of.layers):
            found = step.found.get(layer.name)
            if found is None:
                continue
            step.found[layer.name] = found._replace(
                indices=np.concatenate(indices[position]), values=np.concatenate(values[position])
            )
            if rounding[position] and rounding[position][0] is not None:
                there = [rest for rest in rounding[position] if rest is not None]
                step.kept[bucket][position] = np.concatenate(there)

    def _farewell_of(self, buckets: Collection[int]) -> dict[int, Farewell]:
        owners, step, now = self.owners, self._step, self._clock.now
        if owners is None:
            return super()._farewell_of(buckets)
        farewell = dict[int, Farewell]()
        for bucket in buckets:
            total = self._total(bucket)
            room = owners.shares.room(bucket, total).tolist()
            share = int(owners.shares.of(bucket, total)[self.rank])
            regions, own = owners.regions[bucket], owners.own(bucket).handed_out
            parts = [pack_abandoned(r.sent, n, now) for r, n in zip(regions, room, strict=True)]
            farewell[bucket] = Farewell(
                parts if bucket not in step.closed else None,
                pack_abandoned(own, share, now) if bucket not in step.sent else None,
                None,
            )
        return farewell

    def added_up(self, bucket: int, total: np.ndarray) -> None:
        """Takes what all ranks sent this one of its region, and adds it up.

        Args:
            bucket: its number.
            total: uint8, all ranks' parts in rank order.

        Raises:
            PayloadError: they are not this bucket's.
            RanksDisagreeError: some rank is in another step, and sent another number of entries.
        """
        owners = self.owners
        if owners is None:
            super().added_up(bucket, total)
            return
        step, begun, part = self._step, perf_counter(), owners.own(bucket).sent
        room = int(owners.shares.room(bucket, self._total(bucket))[self.rank])
        try:
            payloads = unpack(part, room, total, self.world_size)
        except PayloadError:
            told, _ = headers_in(part, total)
            if len(told) == self.world_size:
                self._check_clock(dict(enumerate(told)))
            raise
        if payloads.all_of(self._clock.now):
            step.merged[bucket] = owners.merge(bucket, payloads, self._total(bucket))
        else:
            step.told[bucket] = dict(enumerate(payloads.told()))
            gone = any(x.abandoned == Abandoned.GIVEN_UP for x in step.told[bucket].values())
            step.abandoned[bucket] = Abandoned.GIVEN_UP if gone else Abandoned.OUT_OF_STEP
        step.added_up.add(bucket)
        self.watch.seconds["unpack"] += perf_counter() - begun

    def payload(self, bucket: int) -> np.ndarray:
        """What this rank sends to all: of a bucket or, with owners, of its own region of it."""
        owners, step = self.owners, self._step
        if owners is None:
            return super().payload(bucket)
        begun, part, now = perf_counter(), owners.own(bucket).handed_out, self._clock.now
        share = int(owners.shares.of(bucket, self._total(bucket))[self.rank])
        why = step.abandoned.get(bucket)
        if why is not None:
            payload = pack_abandoned(part, share, now, why)
        else:
            merged = step.merged[bucket]
            packed = pack(part, share, merged.pieces, merged.watched, now)
            payload, step.rounding[bucket] = packed.payload, packed.kept
        # Each of the other ranks gets so much of this one.
        step.sent[bucket] = step.scattered[bucket] // self.world_size + len(payload)
        self.watch.seconds["pack"] += perf_counter() - begun
        self.watch.sent()
        return payload

    def _taken_apart(self, bucket: int, gathered: np.ndarray) -> tuple[Payloads, dict[int, Told]]:
        owners = self.owners
        if owners is None:
            return super()._taken_apart(bucket, gathered)
        told = self._step.told.get(bucket, {})
        if told:
            self._check_clock(told)  # who it was, and not only that the owners have heard of it
        shares = owners.shares.of(bucket, self._total(bucket)).tolist()
        regions = [region.handed_out for region in owners.regions[bucket]]
        lengths = [payload_bytes(r, n) for r, n in zip(regions, shares, strict=True)]
        if gathered.dtype != np.uint8 or len(gathered) != sum(lengths):
            raise PayloadError(
                f"bucket {self.routing.buckets[bucket].name!r}: gathered {gathered.size} items of "
                f"{gathered.dtype}, expected {sum(lengths)} bytes; are all ranks in the same step?"
            )
        ends = np.cumsum([0, *lengths])
        payloads = [
            unpack(region, share, gathered[ends[rank] : ends[rank + 1]], [rank])
            for rank, (region, share) in enumerate(zip(regions, shares, strict=True))
        ]
        told = {rank: each.told()[0] for rank, each in enumerate(payloads)}
        if any(x.clock != self._clock.now or x.abandoned for x in told.values()):
            self._check_clock(told)
        return self._joined(bucket, payloads), {}

    def _told_by_headers(self, bucket: int, gathered: np.ndarray) -> dict[int, Told]:
        owners = self.owners
        if owners is None:
            return super()._told_by_headers(bucket, gathered)
        return {}

    def _joined(self, bucket: int, payloads: list[Payloads]) -> Payloads:
        """What all owners hand out of a bucket, as if one rank had sent it."""
        owners, of = self.owners, self.routing.buckets[bucket]
        assert owners is not None
        n = len(of.layers)
        entries, status = np.zeros(n, np.int64), np.full(n, ABSENT, np.uint8)
        window = payloads[0].counts.shape[-1]
        bases, counts = np.zeros(n, np.int64), np.zeros((n, window), np.int64)
        indices, values = [], []
        for region, each in zip(owners.regions[bucket], payloads, strict=True):
            for position, (layer, begin) in enumerate(
                zip(region.layers.tolist(), region.begins.tolist(), strict=True)
            ):
                said = int(each.status[0, position])
                status[layer] = _worse(int(status[layer]), said)
                own_indices, own_values = each[0].entries(position)
                entries[layer] += len(own_indices)
                indices.append(own_indices + np.uint32(begin))
                values.append(own_values)
                if said == SENT:
                    base = int(each.bases[0, position])
                    bases[layer], counts[layer] = _together(
                        int(bases[layer]), counts[layer], base, each.counts[0, position]
                    )
        self._step.of_regions[bucket] = (
            np.array([each.bases[0].max() for each in payloads]),
            np.stack([each.counts[0].sum(axis=0) for each in payloads]),
        )
        return Payloads(
            payloads[0].headers,
            payloads[0].watched,
            status[None],
            bases[None],
            counts[None],
            starts_of(entries[None]),
            [(np.concatenate(indices), np.concatenate(values))],
            from_owners=True,
        )


def _fitted(pieces: list[Any], room: int) -> list[Any]:
    """Leaves the smallest entries of all pieces out for which there is no room."""
    there = [piece for piece in pieces if isinstance(piece, Piece)]
    over = sum(len(piece.indices) for piece in there) - room
    if over <= 0:
        return pieces
    magnitudes = np.abs(np.concatenate([piece.values for piece in there]))
    stays = np.ones(len(magnitudes), bool)
    stays[np.argsort(magnitudes, kind="stable")[:over]] = False
    fitted, start = [], 0
    for piece in pieces:
        if isinstance(piece, Piece):
            own = stays[start : start + len(piece.indices)]
            start += len(piece.indices)
            piece = piece._replace(indices=piece.indices[own], values=piece.values[own])
        fitted.append(piece)
    return fitted


def _worse(one: int, other: int) -> int:
    """What is to be said of a layer whose pieces say this."""
    if NOT_FINITE in (one, other):
        return NOT_FINITE
    return SENT if SENT in (one, other) else ABSENT


def _together(
    base: int, counts: np.ndarray, other_base: int, other: np.ndarray
) -> tuple[int, np.ndarray]:
    """Two sketches as one, from where both are known; one without counts does not count."""
    if not counts.any():
        return other_base, other.copy()
    if not other.any():
        return base, counts
    top = max(base, other_base)
    total = np.zeros_like(counts)
    for first, each in ((base, counts), (other_base, other)):
        moved = min(top - first, len(each) - 1)
        total[: len(each) - moved] += each[moved:]
    return top, total
