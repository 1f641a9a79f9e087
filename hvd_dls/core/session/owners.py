"""What an owner does with what ranks send it of its regions: sums, of which it hands out some.

What it does not hand out it keeps, and adds to what comes next: a residual of sums.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from hvd_dls.core.adding import add_up
from hvd_dls.core.balancing.layers import LayerSpec
from hvd_dls.core.balancing.ratios import apportion
from hvd_dls.core.balancing.sketch import BELOW, LAST_BASE, WINDOW, Sketch, bin_of
from hvd_dls.core.selection.passes import reaching
from hvd_dls.core.wire.dealing import Dealing
from hvd_dls.core.wire.layout import ABSENT, NOT_FINITE, SENT, Bucket, Status
from hvd_dls.core.wire.payload import Payloads
from hvd_dls.core.wire.regions import Region, regions_of
from hvd_dls.core.wire.strips import Frame, Strip

_SLACK = 1.15  # entries that ranks may send to an owner, for each one that it hands out
_MORE = 4  # and so many more


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
        said: (R, P) bool, of each piece, then each watched layer, that is NOT_FINITE: which of the
            ranks that sent said so.
    """

    sums: np.ndarray
    status: np.ndarray
    watched: dict[str, Status]
    pieces: list[Any]
    said: np.ndarray


class KeptPiece(NamedTuple):
    """What an owner keeps of a piece of a layer.

    Attributes:
        layer: the whole one.
        label: of the piece: see ``Dealing.label``.
        places: (n,) which entries of the layer these are.
        sums: (n,) a view.
    """

    layer: LayerSpec
    label: str
    places: np.ndarray
    sums: np.ndarray


class Owners:
    """The regions of a model's buckets, and what this rank keeps of its own.

    Each owner hands out as much of its region as the region is of its bucket.

    Args:
        buckets: of the model.
        owners: number of ranks that send each bucket: its owners, P.
        own_number: of this rank among them.
        sends: of each bucket, whether this rank is one of them.

    Attributes:
        dealings: of each bucket.
        regions: of each bucket, of each owner.
        kept: of each bucket, (n,) what this rank keeps of its own region; () of those that it
            does not send.

    Raises:
        DLSError: see ``Dealing``.
    """

    def __init__(
        self, buckets: Sequence[Bucket], owners: int, own_number: int, sends: Sequence[bool]
    ) -> None:
        self.own_number, self._sends = own_number, sends
        self.dealings = [Dealing(bucket, owners) for bucket in buckets]
        self.regions = [regions_of(dealing) for dealing in self.dealings]
        self.kept = [
            np.zeros(own[own_number].size if mine else 0, bucket.layers[0].work_dtype)
            for bucket, own, mine in zip(buckets, self.regions, sends, strict=True)
        ]
        self._sizes = [np.array([r.size for r in own]) for own in self.regions]
        self._shares: list[np.ndarray] = [np.zeros(0, np.int64)] * len(buckets)
        self._thresholds = [0.0] * len(buckets)  # where to look first, no part of the state
        self._frames = {
            (bucket, out): Frame([r.handed_out if out else r.sent for r in own])
            for bucket, own in enumerate(self.regions)
            for out in (False, True)
        }
        self._strips: dict[tuple[int, bool], Strip] = {}

    def own(self, bucket: int) -> Region:
        """This rank's region of a bucket that it sends."""
        return self.regions[bucket][self.own_number]

    def names(self, bucket: int, owner: int) -> list[str]:
        """The layer of each piece of an owner's region, then the watched layers it hears of."""
        dealing, region = self.dealings[bucket], self.regions[bucket][owner].sent
        first = int(dealing.first[owner])
        layers = dealing.layers[first : first + len(region.layers)].tolist()
        return [*(dealing.bucket.layers[n].name for n in layers), *region.watched]

    def shares(self, bucket: int, total: int) -> np.ndarray:
        """(P,) int64 sums that each owner hands out of a bucket, ``total`` together.

        With fewer sums than owners each owner still has room for one.
        """
        sizes = self._sizes[bucket]
        total = max(total, len(sizes))
        if self._shares[bucket].sum() != total:
            self._shares[bucket] = apportion(sizes, total, np.ones_like(sizes), sizes)
        return self._shares[bucket]

    def share(self, bucket: int, total: int) -> int:
        """Sums that this rank hands out of a bucket that it sends, of ``total``."""
        return int(self.shares(bucket, total)[self.own_number])

    def room(self, bucket: int, total: int) -> np.ndarray:
        """(P,) int64 entries that a rank may send to each owner."""
        wanted = np.ceil(self.shares(bucket, total) * _SLACK).astype(np.int64) + _MORE
        room: np.ndarray = np.minimum(wanted, self._sizes[bucket])
        return room

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
        add_up(payloads.entries, payloads.starts, offsets, sums)
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
        bad = [watched.get(name) == NOT_FINITE for name in region.sent.watched]
        told = np.concatenate([payloads.status, payloads.watched], axis=1)
        said = told[:, [*(status == NOT_FINITE).tolist(), *bad]] == NOT_FINITE
        return Merged(sums, status, watched, pieces, said.T)

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

    def pieces(self) -> Iterator[KeptPiece]:
        """What is kept, piece by piece."""
        for dealing, region, kept, mine in zip(
            self.dealings,
            (own[self.own_number] for own in self.regions),
            self.kept,
            self._sends,
            strict=True,
        ):
            first = int(dealing.first[self.own_number])
            for position in range(len(region.sent.layers) if mine else 0):
                start, stop = region.sent.offsets[position : position + 2].tolist()
                number = first + position
                layer = dealing.bucket.layers[dealing.layers[number]]
                places = dealing.places(number)
                yield KeptPiece(layer, dealing.label(number), places, kept[start:stop])


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
    near, values, threshold = _near(sums, status, offsets, share, before)
    beyond = near[~np.isfinite(values)]
    if len(beyond):  # the sum went beyond the type
        status[_pieces_of(beyond, offsets)] = NOT_FINITE
        return [None if said != ABSENT else ABSENT for said in status.tolist()], before
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
    sums: np.ndarray, status: np.ndarray, offsets: np.ndarray, share: int, before: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Entries that are not zero, and not too small to be chosen or to be counted in a sketch.

    Returns:
        Their places, ascending; their magnitudes; and the smallest of the ``share`` largest of all,
        zero if there are not so many.
    """
    # A sketch begins two octaves below the threshold, which may have moved by one.
    least = sums.dtype.type(before / 8)
    if least > 0:
        near, values = _reaching(sums, status, offsets, least)
        if len(values) >= share:
            threshold = np.partition(values, len(values) - share)[len(values) - share]
            if bin_of(least) < _base_of(threshold):
                return near, values, threshold
    near, values = _reaching(sums, status, offsets, np.finfo(sums.dtype).smallest_subnormal)
    if len(values) < share:
        return near, values, np.zeros((), sums.dtype)
    return near, values, np.partition(values, len(values) - share)[len(values) - share]


def _reaching(
    sums: np.ndarray, status: np.ndarray, offsets: np.ndarray, least: float
) -> tuple[np.ndarray, np.ndarray]:
    """Places and magnitudes of those that reach a limit, in pieces that are in the step."""
    places = reaching(sums, least)
    if (status != SENT).any():
        places = places[status[_pieces_of(places, offsets)] == SENT]
    return places, np.abs(sums[places])


def _pieces_of(places: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """In which piece each of these places is."""
    return np.searchsorted(offsets, places, side="right") - 1


def _base_of(threshold: np.ndarray) -> int:
    return min(max(int(bin_of(threshold)) - BELOW, 0), LAST_BASE)
