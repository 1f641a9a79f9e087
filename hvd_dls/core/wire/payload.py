"""What a payload holds, before it is packed and after it was unpacked."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np

from hvd_dls.core.balancing.sketch import Sketch
from hvd_dls.core.received import Received, addresses
from hvd_dls.core.wire import elias_fano
from hvd_dls.core.wire.layout import Abandoned, Bucket, Clock
from hvd_dls.errors import DLSError


class Found(Protocol):
    """What a rank sends of a layer."""

    @property
    def indices(self) -> np.ndarray:
        """(k,) uint32, ascending."""

    @property
    def values(self) -> np.ndarray:
        """(k,) finite, of the layer's work dtype."""

    @property
    def sketch(self) -> Sketch:
        """Of the layer's magnitudes."""


class Packed(NamedTuple):
    """A payload, and what rounding to 16 bits kept back of each layer's values."""

    payload: np.ndarray  # uint8
    kept: list[np.ndarray | None]  # (k,) float32 a layer; None: nothing, or the layer is not sent


class Told(NamedTuple):
    """What a payload's header tells of its sender."""

    clock: Clock
    abandoned: Abandoned


class Payload(NamedTuple):
    """One rank's part of a gathered buffer; values and indices may be views into it."""

    clock: Clock
    abandoned: Abandoned  # whether the rank has given the step up
    watched: np.ndarray  # (W,) uint8: as status, of the watched layers
    status: np.ndarray  # (L,) uint8: SENT, NOT_FINITE or ABSENT
    bases: np.ndarray  # (L,) uint16, of the sketches
    counts: np.ndarray  # (T, WINDOW) int64, of the layers that have sketches
    starts: np.ndarray  # (L + 1,) int64: where each layer's entries begin
    indices: np.ndarray  # (K,) uint32, in each layer ascending from its own zero
    values: np.ndarray  # (K,) of the work dtype, finite

    def entries(self, position: int) -> tuple[np.ndarray, np.ndarray]:
        """Indices and values of a layer, by its number in the bucket; empty if it is not sent."""
        part = slice(self.starts[position], self.starts[position + 1])
        return self.indices[part], self.values[part]


class Payloads(Sequence[Payload]):
    """Some ranks' payloads of a bucket, in rank order: each field as one array, a row a rank.

    Args:
        headers: (P,) HEADER.
        watched: (P, W), as in ``Payload``.
        status: (P, L), as in ``Payload``.
        bases: (P, L), as in ``Payload``.
        counts: (P, T, WINDOW), as in ``Payload``.
        starts: (P, L + 1), as in ``Payload``.
        entries: each rank's indices and values; longer than ``starts`` says, perhaps.
        from_owners: whether the one row is of sums, which owners have handed out.
        named: of these, names of layers that are NOT_FINITE, and on which of the ranks that sent,
            by their number; a layer that is not among them is nobody's own.
    """

    def __init__(
        self,
        headers: np.ndarray,
        watched: np.ndarray,
        status: np.ndarray,
        bases: np.ndarray,
        counts: np.ndarray,
        starts: np.ndarray,
        entries: Sequence[tuple[np.ndarray, np.ndarray]],
        from_owners: bool = False,
        named: Sequence[tuple[str, int]] = (),
    ) -> None:
        self.from_owners, self.named = from_owners, named
        self.headers, self.watched, self.status = headers, watched, status
        self.bases, self.counts, self.starts = bases, counts, starts
        self.entries = entries

    def __len__(self) -> int:
        return len(self.headers)

    def __getitem__(self, rank):  # type: ignore[no-untyped-def]
        clock, abandoned = told_by(self.headers[rank])
        indices, values = self.entries[rank]
        total = int(self.starts[rank, -1])
        return Payload(
            clock,
            abandoned,
            self.watched[rank],
            self.status[rank],
            self.bases[rank],
            self.counts[rank],
            self.starts[rank],
            indices[:total],
            values[:total],
        )

    def all_of(self, clock: Clock) -> bool:
        """Whether all ranks take part in this step."""
        fields = (("step", clock.step), ("attempt", clock.attempt), ("abandoned", Abandoned.NO))
        return all((self.headers[name] == value).all() for name, value in fields)

    def told(self) -> list[Told]:
        """What each rank's header tells of it."""
        return [told_by(header) for header in self.headers]

    def received(self, position: int) -> Received:
        """All ranks' entries of a layer, by its number in the bucket."""
        bounds = self.starts[:, position : position + 2]
        return Received(self.entries, bounds, self._tables[position])

    @cached_property
    def _tables(self) -> np.ndarray:
        """(L, P, 3) of all layers: see ``Received``."""
        itemsize = np.array([array.itemsize for array in self.entries[0]])
        first = addresses(self.entries)[:, None, :] + self.starts[:, :-1, None] * itemsize
        tables = np.concatenate([first, np.diff(self.starts)[:, :, None]], axis=2)
        return np.ascontiguousarray(tables.transpose(1, 0, 2))


def joined(payloads: Sequence[Payloads]) -> Payloads:
    """Payloads of some ranks after those of others."""

    def rows(name: str) -> np.ndarray:
        return np.concatenate([getattr(each, name) for each in payloads])

    return Payloads(
        rows("headers"),
        rows("watched"),
        rows("status"),
        rows("bases"),
        rows("counts"),
        rows("starts"),
        [pair for each in payloads for pair in each.entries],
    )


def told_by(header: np.void) -> Told:
    """What a header tells of its sender."""
    clock = Clock(int(header["step"]), int(header["attempt"]))
    return Told(clock, Abandoned(header["abandoned"]))


def checked_k(bucket: Bucket, k: np.ndarray | int) -> tuple[np.ndarray | None, int]:
    """k as int64, None if only the capacity is given; and the capacity that it makes."""
    if isinstance(k, int):
        return None, k
    k = np.asarray(k, np.int64)
    if k.shape != (len(bucket.layers),) or k.min() < 0:
        raise DLSError(
            f"bucket {bucket.name!r} of {len(bucket.layers)} layers: k of shape {k.shape}, "
            f"{k.tolist()[:8]}"
        )
    return k, int(k.sum())


def starts_of(entries: np.ndarray) -> np.ndarray:
    """Where each layer's entries begin: (..., L + 1) int64, of (..., L)."""
    starts = np.zeros((*entries.shape[:-1], entries.shape[-1] + 1), np.int64)
    np.cumsum(entries, axis=-1, out=starts[..., 1:])
    return starts


def first_wrong(bucket: Bucket, starts: np.ndarray, indices: np.ndarray) -> int:
    """The first layer whose indices do not ascend or leave it, or GOOD."""
    if not len(indices):
        return elias_fano.GOOD
    good = np.ones(len(indices), bool)  # from here to the next one, or the layer's end
    np.less(indices[:-1], indices[1:], out=good[:-1])
    filled = np.flatnonzero(starts[1:] > starts[:-1])
    last = starts[1:][filled] - 1
    good[last] = indices[last] < np.diff(bucket.offsets)[filled]
    if good.all():
        return elias_fano.GOOD
    return int(np.searchsorted(starts, np.argmin(good), side="right")) - 1
