"""What an owner does with what ranks send it of its regions: sums, of which it hands out some.

What it does not hand out it keeps, and adds to what comes next: a residual of sums.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from hvd_dls.core.balancing.layers import LayerSpec
from hvd_dls.core.balancing.shares import Shares
from hvd_dls.core.balancing.sketch import BELOW, LAST_BASE, WINDOW, Sketch, bin_of
from hvd_dls.core.wire.layout import ABSENT, NOT_FINITE, SENT, Bucket, Status
from hvd_dls.core.wire.payload import Payloads
from hvd_dls.core.wire.regions import Edges, Region, bounds_of, edges_of, regions_of
from hvd_dls.core.wire.strips import Frame, Strip


class Piece(NamedTuple):
    """What is sent of a piece of a layer: ``payload.Found``."""

    indices: np.ndarray
    values: np.ndarray
    sketch: Any = None


class Merged(NamedTuple):
    """What an owner makes of its region in a step.

    Attributes:
        sums: (n,) of the region, with what has been handed out still in it.
        status: of each piece.
        watched: of watched layers, those that are not SENT, by name.
        pieces: what is handed out of each; None or ABSENT, as for ``pack``.
    """

    sums: np.ndarray
    status: np.ndarray
    watched: dict[str, Status]
    pieces: list[Any]


class Owners:
    """The regions of a model's buckets, and what this rank keeps of its own.

    Args:
        buckets: of the model.
        k: of each bucket, (L,) entries that its layers send at first.
        owners: number of ranks that send each bucket: its owners.
        own_number: of this rank among them.
        sends: of each bucket, whether this rank is one of them.

    Attributes:
        regions: of each bucket, of each owner.
        kept: of each bucket, (n,) what this rank keeps of its own region; () of those that it
            does not send.
        shares: what each owner hands out.

    Raises:
        DLSError: see ``bounds_of``.
    """

    def __init__(
        self,
        buckets: Sequence[Bucket],
        k: Sequence[np.ndarray],
        owners: int,
        own_number: int,
        sends: Sequence[bool],
    ) -> None:
        self.own_number, self._buckets, self._sends = own_number, buckets, sends
        self.shares = Shares(
            [bounds_of(bucket, owners, first) for bucket, first in zip(buckets, k, strict=True)]
        )
        self.regions: list[list[Region]] = [[] for _ in buckets]
        self.kept: list[np.ndarray] = [np.empty(0)] * len(buckets)
        self._thresholds = [0.0] * len(buckets)  # where to look first, no part of the state
        self._edges: dict[int, Edges] = {}
        self._frames: dict[tuple[int, bool], Frame] = {}
        self._strips: dict[tuple[int, bool], Strip] = {}
        for bucket in range(len(buckets)):
            self._make(bucket)

    def _make(self, bucket: int) -> None:
        of = self._buckets[bucket]
        self.regions[bucket] = regions_of(of, self.shares.bounds[bucket])
        size = self.own(bucket).size if self._sends[bucket] else 0
        self.kept[bucket] = np.zeros(size, of.layers[0].work_dtype)
        self._edges[bucket] = edges_of(of, self.regions[bucket])
        for handed_out in (False, True):
            self._strips.pop((bucket, handed_out), None)
            own = [r.handed_out if handed_out else r.sent for r in self.regions[bucket]]
            self._frames[bucket, handed_out] = Frame(own)

    def follow(self, residuals: Mapping[str, np.ndarray] | None) -> None:
        """Takes over where regions are now.

        Args:
            residuals: of this rank, by layer: what it has kept of a region that has moved joins
                them, and so all that waits is still there.  None: it is void.
        """
        for bucket, bounds in enumerate(self.shares.bounds):
            before = self.regions[bucket]
            if [*(region.start for region in before), before[-1].stop] == bounds.tolist():
                continue
            if residuals is not None:
                for layer, begin, array in self._pieces_of(bucket):
                    residuals[layer.name][begin : begin + len(array)] += array
            self._make(bucket)

    def own(self, bucket: int) -> Region:
        """This rank's region of a bucket that it sends."""
        return self.regions[bucket][self.own_number]

    def share(self, bucket: int, total: int) -> int:
        """Sums that this rank hands out of a bucket that it sends, of ``total``."""
        return int(self.shares.of(bucket, total)[self.own_number])

    def edges(self, bucket: int) -> Edges:
        """Where the pieces of all owners' regions begin."""
        return self._edges[bucket]

    def strip(self, bucket: int, room: np.ndarray, handed_out: bool) -> Strip:
        """Where things stand in what all owners get of a rank; or in what they hand out.

        Args:
            bucket: its number.
            room: (P,) entries that each owner's payload has room for.
            handed_out: which.
        """
        strip = self._strips.get((bucket, handed_out))
        if strip is None or not np.array_equal(strip.room, room):
            strip = Strip(self._frames[bucket, handed_out], room)
            self._strips[bucket, handed_out] = strip
        return strip

    def merge(self, bucket: int, payloads: Payloads, total: int) -> Merged:
        """Adds up what ranks sent, rank by rank, and chooses what to hand out; keeps nothing yet.

        Args:
            bucket: its number.
            payloads: of all ranks, of this one's region.
            total: sums that all owners together hand out.
        """
        region, offsets = self.own(bucket), self.own(bucket).sent.offsets
        sums = self.kept[bucket].copy()
        entries, totals = np.diff(payloads.starts, axis=1), payloads.starts[:, -1].tolist()
        own = [(i[:n], v[:n]) for (i, v), n in zip(payloads.entries, totals, strict=True)]
        where = np.concatenate([indices for indices, _ in own])
        where = where + np.repeat(np.tile(offsets[:-1], len(own)), entries.ravel())
        np.add.at(sums, where, np.concatenate([values for _, values in own]))  # in this order
        status = np.where((payloads.status == SENT).any(axis=0), SENT, ABSENT)
        status[(payloads.status == NOT_FINITE).any(axis=0)] = NOT_FINITE
        watched: dict[str, Status] = {}
        for position, name in enumerate(region.sent.watched):
            said = payloads.watched[:, position]
            if (said == NOT_FINITE).any():
                watched[name] = NOT_FINITE
            elif (said == ABSENT).all():
                watched[name] = ABSENT
        share = self.share(bucket, total)
        pieces, self._thresholds[bucket] = _hand_out(
            sums, status, offsets, share, self._thresholds[bucket]
        )
        return Merged(sums, status, watched, pieces)

    def commit(self, merged: Mapping[int, tuple[Merged, list[np.ndarray | None]]]) -> None:
        """Keeps what was not handed out, of a step that counts.

        Args:
            merged: by bucket: what was made of it, and what rounding left of each piece's values.
        """
        for bucket, (own, rounding) in merged.items():
            offsets = self.own(bucket).sent.offsets
            for start, piece, left in zip(offsets[:-1], own.pieces, rounding, strict=True):
                if isinstance(piece, Piece):
                    own.sums[start + piece.indices.astype(np.int64)] = 0 if left is None else left
            self.kept[bucket] = own.sums

    def scale(self, factor: float) -> None:
        """Has what is kept follow the loss scale."""
        for kept in self.kept:
            kept *= kept.dtype.type(factor)

    # What is kept, piece by piece ---------------------------------------------------------------

    def pieces(self) -> Iterator[tuple[LayerSpec, int, np.ndarray]]:
        """What is kept, as pieces of layers: the layer, where the piece begins, and a view."""
        for bucket in range(len(self.kept)):
            yield from self._pieces_of(bucket)

    def _pieces_of(self, bucket: int) -> Iterator[tuple[LayerSpec, int, np.ndarray]]:
        if not self._sends[bucket]:
            return
        region, kept = self.own(bucket), self.kept[bucket]
        for position, layer in enumerate(region.layers.tolist()):
            start, stop = region.sent.offsets[position : position + 2].tolist()
            whole = self._buckets[bucket].layers[layer]
            yield whole, int(region.begins[position]), kept[start:stop]


def _hand_out(
    sums: np.ndarray, status: np.ndarray, offsets: np.ndarray, share: int, before: float
) -> tuple[list[Any], float]:
    """The largest sums of the pieces that are in the step, ties to the lower index.

    Args:
        sums: (n,) of a region.
        status: (L,) of its pieces; of those with sums beyond the type it becomes NOT_FINITE.
        offsets: (L + 1,) where they begin.
        share: how many, at most.
        before: the threshold of another step, so that most entries need no second look.

    Returns:
        What is handed out of each piece, as for ``pack``, and the threshold.
    """
    magnitudes = np.abs(sums)
    for position in np.flatnonzero(status != SENT).tolist():
        magnitudes[offsets[position] : offsets[position + 1]] = 0
    if not np.isfinite(magnitudes.max()):  # the sum went beyond the type
        beyond = np.add.reduceat(~np.isfinite(magnitudes), offsets[:-1]) > 0
        status[beyond] = NOT_FINITE
        return [None if said != ABSENT else ABSENT for said in status.tolist()], before
    near, values, threshold = _near(magnitudes, share, before)
    base = _base_of(threshold)
    above = np.flatnonzero(values > threshold)
    ties = np.flatnonzero(values == threshold)[: share - len(above)]
    chosen = near[np.sort(np.concatenate([above, ties]))]
    bins = np.clip(bin_of(values) - base, -1, WINDOW - 1)
    cuts, looked_at = (np.searchsorted(x, offsets).tolist() for x in (chosen, near))
    pieces: list[Any] = []
    for position, said in enumerate(status.tolist()):
        if said != SENT:
            pieces.append(ABSENT if said == ABSENT else None)
            continue
        own = chosen[cuts[position] : cuts[position + 1]]
        own_bins = bins[looked_at[position] : looked_at[position + 1]]
        counts = np.bincount(own_bins + 1, minlength=WINDOW + 1)[1:]
        sketch = Sketch(base, counts.astype(np.uint32))
        pieces.append(Piece((own - offsets[position]).astype(np.uint32), sums[own], sketch))
    return pieces, float(threshold)


def _near(
    magnitudes: np.ndarray, share: int, before: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Entries that are not zero, and not too small to be chosen or to be counted in a sketch.

    Returns:
        Their places, ascending; they themselves; and the smallest of the ``share`` largest of all,
        zero if there are not so many.
    """
    # A sketch begins two octaves below the threshold, which may have moved by one.
    least = magnitudes.dtype.type(before / 8)
    if least > 0:
        near = np.flatnonzero(magnitudes >= least)
        values = magnitudes[near]
        if len(values) >= share:
            threshold = np.partition(values, len(values) - share)[len(values) - share]
            if bin_of(least) < _base_of(threshold):
                return near, values, threshold
    near = np.flatnonzero(magnitudes)
    values = magnitudes[near]
    if len(values) < share:
        return near, values, np.zeros((), magnitudes.dtype)
    return near, values, np.partition(values, len(values) - share)[len(values) - share]


def _base_of(threshold: np.ndarray) -> int:
    return min(max(int(bin_of(threshold)) - BELOW, 0), LAST_BASE)
