"""The payloads of all regions of a bucket, side by side: written, or read, in one go.

``pack`` and ``unpack`` take a region at a time, and cost a tenth of a millisecond or two each,
however little is in it.  Here that is paid once for all owners.  The bytes are the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from hvd_dls.core.balancing.sketch import LAST_BASE
from hvd_dls.core.wire import elias_fano
from hvd_dls.core.wire.layout import (
    ABSENT,
    COUNTS,
    HEADER,
    RECORD,
    SENT,
    Bucket,
    Clock,
    Status,
    header_of,
)
from hvd_dls.core.wire.payload import Payloads, starts_of
from hvd_dls.core.wire.values import WIRE_DTYPES, decode_counts, decode_values, round_values

_WORD = np.dtype("<u8")


class Written(NamedTuple):
    """All payloads, and what rounding to 16 bits kept back: (K,), or None for nothing."""

    payloads: np.ndarray
    kept: np.ndarray | None


class Pieces(NamedTuple):
    """What all regions' payloads hold, piece by piece.

    Attributes:
        headers: (P,) HEADER.
        watched: (W,) status of the watched layers.
        status: (S,) uint8.
        bases: (S,), of the sketches.
        counts: (T, WINDOW) int64, of the pieces that have sketches.
        starts: (S + 1,) where each piece's entries begin.
        indices: (K,) uint32, in each piece ascending from its own zero.
        values: (K,) of the work dtype.
    """

    headers: np.ndarray
    watched: np.ndarray
    status: np.ndarray
    bases: np.ndarray
    counts: np.ndarray
    starts: np.ndarray
    indices: np.ndarray
    values: np.ndarray


class Frame:
    """What does not depend on the room in the payloads of a bucket's regions.

    Args:
        regions: of one bucket, in order; the first one alone has watched layers.

    Attributes:
        of: the first of them.
        headers: (P,) HEADER, for no room at all.
        universes: (P,) entries of each region.
        records: (P,) bytes of each one's records.
        counts: (P,) bytes of each one's sketches.
        sketched: (T,) the pieces that have sketches.
        watched: (P,) bytes that tell of watched layers.
        first: (P + 1,) each region's first piece, and the number S of all.
        region: (S,) of each piece.
        sizes: (S,) of each piece.
        begins: (S,) where each piece begins in its region.
    """

    def __init__(self, regions: Sequence[Bucket]) -> None:
        self.of = regions[0]
        self.headers = np.stack([header_of(region, 0) for region in regions])
        self.universes = self.headers["size"].astype(np.int64)
        pieces, watched = (self.headers[x].astype(np.int64) for x in ("layers", "watched"))
        self.records, self.watched = RECORD.itemsize * pieces, -(-watched // 8) * 8
        self.first = np.concatenate([[0], np.cumsum(pieces)])
        sketched = [region.sketched for region in regions]
        self.counts = COUNTS.itemsize * np.array([len(each) for each in sketched])
        self.sketched = np.concatenate(
            [first + each for first, each in zip(self.first, sketched, strict=False)]
        )
        self.region = np.repeat(np.arange(len(regions)), pieces)
        self.sizes = np.concatenate([np.diff(region.offsets) for region in regions])
        self.begins = np.concatenate([region.offsets[:-1] for region in regions])


class Strip:
    """Where things stand in the payloads of all regions, one payload after the other.

    Args:
        frame: of the regions.
        room: (P,) entries that each payload has room for, none of them without any.

    Attributes:
        room: as given.
        bounds: (P + 1,) where each payload begins, in bytes.
        first: (P + 1,) each region's first piece, and the number S of all.
        sketched: (T,) the pieces that have sketches.
    """

    def __init__(self, frame: Frame, room: np.ndarray) -> None:
        self._frame, self.room, self.first = frame, np.array(room, np.int64), frame.first
        self.sketched = frame.sketched
        self._of, of = frame.of, frame.of
        itemsize = WIRE_DTYPES[of.values].itemsize
        self._low, *indices = elias_fano.all_lengths(frame.universes, self.room)
        if of.code == "plain":
            self._low, indices = 0 * self.room, [-(-self.room * 4 // 8) * 8, 0 * self.room]
        # As in ``layout``.
        lengths = [
            np.full_like(self.room, HEADER.itemsize),
            frame.records,
            frame.counts,
            frame.watched,
            -(-self.room * itemsize // 8) * 8,
            *indices,
        ]
        self.bounds = np.concatenate([[0], np.cumsum(sum(lengths))])
        begins = self.bounds[:-1] + np.cumsum(lengths, axis=0)
        records, counts, watched, values, lower, upper, ends = begins
        self._watched, self._watched_end = int(watched[0]), int(values[0])
        self._headers = frame.headers.copy()
        self._headers["capacity"], self._headers["low_bits"] = self.room, self._low
        self._header_at = self.bounds[:-1, None] // 8 + np.arange(HEADER.itemsize // 8)
        within = np.arange(self.first[-1]) - self.first[frame.region]
        self._record_at = records[frame.region] // 8 + RECORD.itemsize // 8 * within
        width = COUNTS.itemsize // 8
        region = frame.region[frame.sketched]
        within = np.arange(len(region)) - np.searchsorted(region, region)
        self._counts_at = (counts[region] // 8 + width * within)[:, None] + np.arange(width)
        self._values_at = values // itemsize
        self._slots = (lower - values) // itemsize  # for values, with what fills up a word
        self._lower_at, self._upper_at, self._ends = lower // 8, upper // 8, ends // 8

    def write(
        self,
        entries: np.ndarray,
        indices: np.ndarray,
        values: np.ndarray,
        status: np.ndarray,
        watched: Mapping[str, Status],
        clock: Clock,
    ) -> Written:
        """As ``pack`` of each region, of which none has sketches.

        Args:
            entries: (S,) of each piece.
            indices: (K,) uint32, in each piece ascending from its own zero, and below its size.
            values: (K,) finite, of the work dtype.
            status: (S,) of each piece.
            watched: status of those of the bucket's watched layers that is not SENT, by name.
            clock: of the step.
        """
        of, starts = self._of, starts_of(entries)
        totals, own = self._totals(starts)
        assert not len(of.sketched)
        assert (totals <= self.room).all()
        payloads = np.zeros(self.bounds[-1], np.uint8)
        words, kind = payloads.view(_WORD), WIRE_DTYPES[of.values]
        headers = self._headers.copy()
        headers["entries"], headers["attempt"] = totals, clock.attempt
        headers["step"] = clock.step & 0xFFFFFFFF
        words[self._header_at] = headers.view(_WORD).reshape(self._header_at.shape)
        told = [watched.get(name, SENT) for name in of.watched]
        payloads[self._watched : self._watched + len(told)] = told
        rounded = round_values(values, of.values, starts)
        records = np.zeros(len(entries), RECORD)
        records["entries"], records["status"] = entries, status
        records["exponent"] = rounded.exponents
        words[self._record_at] = records.view(_WORD)
        payloads.view(kind)[self._places(self._values_at, totals, own)] = rounded.sent
        if of.code == "plain":
            payloads.view("<u4")[self._places(2 * self._lower_at, totals, own)] = indices
        else:
            numbers = indices + np.repeat(self._frame.begins, entries)
            elias_fano.encode_side_by_side(
                numbers, own, self._low, self._lower_at, self._upper_at, words
            )
        return Written(payloads, rounded.kept)

    def read(self, payloads: np.ndarray, clock: Clock) -> Pieces | None:
        """As ``unpack`` of each region.

        Args:
            payloads: uint8, of the right length.
            clock: of the step.

        Returns:
            What they hold; None if some rank is in another step, or anything is wrong: ``unpack``
            tells what.
        """
        if payloads.__array_interface__["data"][0] % 8 or not payloads.flags.c_contiguous:
            payloads = payloads.copy()  # compiled loops read whole words
        of, words = self._of, payloads.view(_WORD)
        headers = words[self._header_at].view(HEADER)[:, 0]
        expected = self._headers.copy()
        expected["entries"], expected["attempt"] = headers["entries"], clock.attempt
        expected["step"] = clock.step & 0xFFFFFFFF
        records = words[self._record_at].view(RECORD)
        status, entries = records["status"], records["entries"].astype(np.int64)
        watched = payloads[self._watched : self._watched_end]
        told, rest = watched[: len(of.watched)], watched[len(of.watched) :]
        starts = starts_of(entries)
        totals, own = self._totals(starts)
        good = (
            headers.tobytes() == expected.tobytes()
            and _are_statuses(status)
            and _are_statuses(told)
            and not rest.any()
            and bool((entries <= np.where(status == SENT, self._frame.sizes, 0)).all())
            and bool((totals <= self.room).all() and (totals == headers["entries"]).all())
            and bool((records["sketch_base"] <= LAST_BASE).all())
            and (of.values == "float16" or not records["exponent"].any())
        )
        if not good:
            return None
        values = self._read_values(payloads, records["exponent"], starts, totals, own)
        indices = self._read_indices(payloads, starts, totals, own)
        if values is None or indices is None:
            return None
        counts = decode_counts(words[self._counts_at].view("<u2"))
        bases = records["sketch_base"]
        return Pieces(headers, told, status, bases, counts, starts, indices, values)

    def _read_values(
        self,
        payloads: np.ndarray,
        exponents: np.ndarray,
        starts: np.ndarray,
        totals: np.ndarray,
        own: np.ndarray,
    ) -> np.ndarray | None:
        items = payloads.view(WIRE_DTYPES[self._of.values])
        sent = items[self._places(self._values_at, totals, own)]
        unused = self._slots - totals
        behind = starts_of(unused)
        rest = items[self._places(self._values_at + totals, unused, behind)]
        values = decode_values(sent, self._of.values, exponents, starts)
        return values if np.isfinite(values).all() and not rest.view(np.uint8).any() else None

    def _read_indices(
        self, payloads: np.ndarray, starts: np.ndarray, totals: np.ndarray, own: np.ndarray
    ) -> np.ndarray | None:
        entries = np.diff(starts)
        if self._of.code == "plain":
            items = payloads.view("<u4")
            indices: np.ndarray = items[self._places(2 * self._lower_at, totals, own)]
            unused = 2 * (self._upper_at - self._lower_at) - totals
            rest = items[self._places(2 * self._lower_at + totals, unused, starts_of(unused))]
            if rest.any() or (indices >= np.repeat(self._frame.sizes, entries)).any():
                return None
            ascending = np.ones(len(indices), bool)
            np.greater(indices[1:], indices[:-1], out=ascending[1:])
            ascending[starts[:-1][entries > 0]] = True
            return indices if ascending.all() else None
        numbers = np.empty(int(own[-1]), np.uint32)
        if not elias_fano.decode_side_by_side(
            payloads.view(_WORD),
            (self._lower_at, self._upper_at, self._ends),
            self._low,
            own,
            numbers,
        ):
            return None
        # In its own piece, and more than the one before in its region.
        indices = numbers.astype(np.int64) - np.repeat(self._frame.begins, entries)
        if (indices < 0).any() or (indices >= np.repeat(self._frame.sizes, entries)).any():
            return None
        return indices.astype(np.uint32)

    def _totals(self, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(P,) entries of each region, and (P + 1,) where they begin."""
        own = starts[self.first]
        return np.diff(own), own

    @staticmethod
    def _places(begins: np.ndarray, lengths: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """Runs of so many places from each beginning: their numbers, one run after the other."""
        places: np.ndarray = np.arange(starts[-1]) + np.repeat(begins - starts[:-1], lengths)
        return places


def pieces_of(payloads: Sequence[Payloads]) -> Pieces:
    """The same of regions that were unpacked one by one."""
    own = [(each[0].indices, each[0].values) for each in payloads]
    status = np.concatenate([each.status[0] for each in payloads])
    entries = np.concatenate([np.diff(each.starts[0]) for each in payloads])
    return Pieces(
        np.concatenate([each.headers for each in payloads]),
        payloads[0].watched[0],
        status,
        np.concatenate([each.bases[0] for each in payloads]),
        np.concatenate([each.counts[0] for each in payloads]),
        starts_of(entries),
        np.concatenate([indices for indices, _ in own]),
        np.concatenate([values for _, values in own]),
    )


def _are_statuses(status: np.ndarray) -> bool:
    return bool(((status >= SENT) & (status <= ABSENT)).all())
