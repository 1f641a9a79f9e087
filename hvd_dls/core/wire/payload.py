"""Packing what a rank sends of a bucket, and unpacking what all ranks sent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, NoReturn, Protocol

import numpy as np

from hvd_dls.core.balancing.sketch import LAST_BASE, WINDOW, Sketch
from hvd_dls.core.wire import elias_fano
from hvd_dls.core.wire.layout import (
    ABSENT,
    HEADER,
    MAX_ENTRIES,
    NOT_FINITE,
    SENT,
    VERSION,
    Bucket,
    Parts,
    Status,
    header_of,
    parts_of,
    payload_bytes,
)
from hvd_dls.core.wire.values import decode_counts, decode_values, encode_counts, round_values
from hvd_dls.errors import DLSError, PayloadError

__all__ = [
    "ABSENT",
    "MAX_ENTRIES",
    "NOT_FINITE",
    "SENT",
    "VERSION",
    "Bucket",
    "Found",
    "Packed",
    "Payload",
    "Status",
    "pack",
    "payload_bytes",
    "unpack",
    "unpack_varying",
]


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


class Payload(NamedTuple):
    """One rank's part of a gathered buffer; values and indices may be views into it."""

    not_finite: str | None  # the first watched layer whose gradient was not
    status: np.ndarray  # (L,) uint8: SENT, NOT_FINITE or ABSENT
    bases: np.ndarray  # (L,) uint16, of the sketches
    counts: np.ndarray  # (L, WINDOW) int64
    starts: np.ndarray  # (L + 1,) int64: where each layer's entries begin
    indices: np.ndarray  # (K,) uint32, in each layer ascending from its own zero
    values: np.ndarray  # (K,) of the work dtype, finite

    def entries(self, position: int) -> tuple[np.ndarray, np.ndarray]:
        """Indices and values of a layer, by its number in the bucket; empty if it is not sent."""
        part = slice(self.starts[position], self.starts[position + 1])
        return self.indices[part], self.values[part]


def pack(
    bucket: Bucket,
    k: np.ndarray,
    found: Sequence[Found | Literal[Status.ABSENT] | None],
    not_finite: str | None = None,
) -> Packed:
    """Writes one payload.

    Args:
        bucket: whose entries these are.
        k: (L,) entries of each layer; their sum is the payload's capacity.
        found: of each layer its k entries; None if its gradient was not finite; ABSENT if it takes
            no part in this step.
        not_finite: the first of the bucket's watched layers whose gradient was not finite.

    Returns:
        The payload, of ``payload_bytes(bucket, k.sum())``, and the rounding errors, which belong
        back into the residuals.

    Raises:
        DLSError: there is not the right number of layers or entries, or indices do not ascend or
            leave their layer.
    """
    k, capacity = _checked_k(bucket, k)
    status = [NOT_FINITE if f is None else ABSENT if f is ABSENT else SENT for f in found]
    if len(status) != len(bucket.layers):
        raise DLSError(
            f"bucket {bucket.name!r}: {len(status)} layers found, expected {len(bucket.layers)}"
        )
    sent = [f for f in found if f is not None and f is not ABSENT]
    entries = np.zeros(len(status), np.int64)
    rows = np.flatnonzero(np.array(status) == SENT)
    entries[rows] = [len(f.indices) for f in sent]
    starts = _starts(entries)
    _check_entries(bucket, k, entries, rows)

    payload = np.zeros(payload_bytes(bucket, capacity), np.uint8)
    parts = parts_of(bucket, capacity, payload)
    refused = 0 if not_finite is None else 1 + bucket.watched.index(not_finite)
    parts.header[0] = header_of(bucket, capacity, int(starts[-1]), refused)
    parts.records["status"] = status
    parts.records["entries"] = entries
    if not sent:
        return Packed(payload, [None] * len(status))
    parts.records["sketch_base"][rows] = [f.sketch.base for f in sent]
    counts = np.concatenate([f.sketch.counts for f in sent]).reshape(-1, WINDOW)
    parts.records["counts"][rows] = encode_counts(counts)
    kept = _put_values(bucket, parts, starts, np.concatenate([f.values for f in sent]))
    _put_indices(bucket, parts, starts, np.concatenate([f.indices for f in sent]))
    if kept is None:
        return Packed(payload, [None] * len(status))
    ends = starts.tolist()
    return Packed(
        payload,
        [
            kept[start:end] if said is SENT else None
            for said, start, end in zip(status, ends, ends[1:], strict=False)
        ],
    )


def unpack(
    bucket: Bucket, k: np.ndarray, gathered: np.ndarray, world_size: int, first_rank: int = 0
) -> list[Payload]:
    """Reads all ranks' payloads of one bucket and checks all there is to check.

    Args:
        bucket: whose payloads these should be.
        k: (L,) entries of each layer that is sent.
        gathered: (world_size * payload_bytes(bucket, k.sum()),) uint8, payloads in rank order.
        world_size: number of ranks.
        first_rank: whose payload comes first, for messages.

    Returns:
        One payload a rank.

    Raises:
        DLSError: k is not one number a layer.
        PayloadError: the buffer is not that; the message names layer or bucket, rank, what was
            found and what was expected.
    """
    k, capacity = _checked_k(bucket, k)
    length = payload_bytes(bucket, capacity)
    if gathered.dtype != np.uint8 or gathered.shape != (world_size * length,):
        raise PayloadError(
            f"bucket {bucket.name!r}: gathered {gathered.size} items of {gathered.dtype}, expected "
            f"{world_size} payloads of {length} bytes"
        )
    if not gathered.flags.c_contiguous or gathered.__array_interface__["data"][0] % 8:
        gathered = gathered.copy()  # compiled loops read whole words
    parts = parts_of(bucket, capacity, gathered.reshape(world_size, length))
    _check_headers(bucket, capacity, parts.header, first_rank)
    _check_records(bucket, k, parts, first_rank)
    counts = decode_counts(parts.records["counts"])
    return [
        _unpack_one(bucket, first_rank + i, Parts(*(part[i] for part in parts)), counts[i])
        for i in range(world_size)
    ]


def unpack_varying(bucket: Bucket, gathered: np.ndarray, world_size: int) -> list[Payload]:
    """Like ``unpack``, where each rank chose the entries of its layers, and so the length, itself.

    Raises:
        PayloadError: as ``unpack``.
    """
    payloads: list[Payload] = []
    gathered = np.asarray(gathered)
    start, head = 0, payload_bytes(bucket, 0)  # header and records
    for rank in range(world_size):
        first = gathered[start : start + head].copy()
        if first.dtype != np.uint8 or len(first) < head:
            raise PayloadError(
                f"bucket {bucket.name!r}, payload of rank {rank}: {len(first)} items of "
                f"{first.dtype}, expected {head} bytes or more"
            )
        parts = parts_of(bucket, 0, first)
        capacity = int(parts.header["capacity"][0])
        k = np.where(parts.records["status"] == SENT, parts.records["entries"], 0).astype(np.int64)
        if k.sum() != capacity or (k > np.diff(bucket.offsets)).any():
            _refuse_payload(bucket, rank, "capacity", capacity, int(k.sum()))
        length = payload_bytes(bucket, capacity)
        payloads += unpack(bucket, k, gathered[start : start + length], 1, rank)
        start += length
    if start != len(gathered):
        raise PayloadError(
            f"bucket {bucket.name!r}: gathered {len(gathered)} bytes, expected {start} from "
            f"{world_size} ranks"
        )
    return payloads


# Writing ----------------------------------------------------------------------------------------


def _check_entries(bucket: Bucket, k: np.ndarray, entries: np.ndarray, rows: np.ndarray) -> None:
    wrong = rows[entries[rows] != k[rows]]
    if len(wrong):
        raise DLSError(
            f"layer {bucket.layers[wrong[0]].name!r}: {entries[wrong[0]]} entries found, expected "
            f"{k[wrong[0]]}"
        )


def _put_values(
    bucket: Bucket, parts: Parts, starts: np.ndarray, values: np.ndarray
) -> np.ndarray | None:
    rounded = round_values(values, bucket.values, starts)
    parts.values[: len(values)] = rounded.sent
    parts.records["exponent"] = rounded.exponents
    return rounded.kept


def _put_indices(bucket: Bucket, parts: Parts, starts: np.ndarray, indices: np.ndarray) -> None:
    if bucket.code == "plain":
        wrong = _first_wrong(bucket, starts, indices)
        parts.lower[: len(indices)] = indices
    else:
        low = int(parts.header["low_bits"][0])
        wrong = elias_fano.encode(indices, starts, bucket.offsets, low, parts.lower, parts.upper)
    if wrong != elias_fano.GOOD:
        raise DLSError(
            f"layer {bucket.layers[wrong].name!r}: indices do not ascend within its "
            f"{bucket.layers[wrong].size} entries"
        )


def _first_wrong(bucket: Bucket, starts: np.ndarray, indices: np.ndarray) -> int:
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


# Reading ----------------------------------------------------------------------------------------


def _check_headers(bucket: Bucket, capacity: int, headers: np.ndarray, first_rank: int) -> None:
    """Checks all fields of all ranks' headers but the number of entries."""
    expected = header_of(bucket, capacity)
    headers = headers[:, 0].copy()
    for rank, refused in enumerate(headers["not_finite"], start=first_rank):
        if refused > len(bucket.watched):
            wanted = f"at most {len(bucket.watched)}"
            _refuse_payload(bucket, rank, "not_finite", refused, wanted)
    headers["entries"] = headers["not_finite"] = 0
    if headers.tobytes() == expected.tobytes() * len(headers):
        return
    for rank, header in enumerate(headers, start=first_rank):
        for field in HEADER.names or ():
            if header[field] != expected[field]:
                _refuse_payload(bucket, rank, field, header[field], expected[field])


def _check_records(bucket: Bucket, k: np.ndarray, parts: Parts, first_rank: int) -> None:
    """Checks all ranks' records, and the number of entries in their headers."""
    records = parts.records
    status, bases, exponents = records["status"], records["sketch_base"], records["exponent"]

    def check(field: str, good: np.ndarray, wanted: object) -> None:
        _check_layers(bucket, field, records[field], good, wanted, first_rank)

    check("status", (status >= SENT) & (status <= ABSENT), "1, 2 or 3")
    expected = np.where(status == SENT, k, 0)
    check("entries", records["entries"] == expected, expected)
    check("sketch_base", bases <= LAST_BASE, f"at most {LAST_BASE}")
    if bucket.values != "float16":
        check("exponent", exponents == 0, 0)
    entries, totals = parts.header["entries"][:, 0], expected.sum(axis=1)
    if (entries != totals).any():
        rank = int(np.argmax(entries != totals))
        _refuse_payload(bucket, first_rank + rank, "entries", entries[rank], totals[rank])


def _check_layers(
    bucket: Bucket,
    field: str,
    found: np.ndarray,
    good: np.ndarray,
    expected: object,
    first_rank: int,
) -> None:
    if good.all():
        return
    rank, layer = np.argwhere(~good)[0]
    wanted = expected[rank, layer] if isinstance(expected, np.ndarray) else expected
    raise PayloadError(
        f"layer {bucket.layers[layer].name!r}, payload of rank {first_rank + rank}: {field} is "
        f"{found[rank, layer]}, expected {wanted}"
    )


def _refuse_payload(
    bucket: Bucket, rank: int, field: str, found: object, expected: object
) -> NoReturn:
    raise PayloadError(
        f"bucket {bucket.name!r}, payload of rank {rank}: {field} is {found}, expected {expected}; "
        "do all ranks run the same version and configuration?"
    )


def _unpack_one(bucket: Bucket, rank: int, parts: Parts, counts: np.ndarray) -> Payload:
    records = parts.records
    starts = _starts(records["entries"])
    total = int(starts[-1])
    sent = parts.values[:total]
    values = decode_values(sent, bucket.values, records["exponent"], starts)
    finite = np.isfinite(values)
    if not finite.all():
        where = int(np.argmin(finite))
        layer = int(np.searchsorted(starts, where, side="right")) - 1
        raise PayloadError(
            f"layer {bucket.layers[layer].name!r}, payload of rank {rank}: value "
            f"{where - starts[layer]} is {values[where]}, expected it to be finite"
        )
    indices = _take_indices(bucket, rank, parts, starts)
    if parts.values[total:].view(np.uint8).any():
        _refuse_payload(bucket, rank, "room for further values", "in use", "zero")
    refused = int(parts.header["not_finite"][0])
    return Payload(
        bucket.watched[refused - 1] if refused else None,
        records["status"],
        records["sketch_base"],
        counts,
        starts,
        indices,
        values,
    )


def _take_indices(bucket: Bucket, rank: int, parts: Parts, starts: np.ndarray) -> np.ndarray:
    total = int(starts[-1])
    if bucket.code == "plain":
        indices = parts.lower[:total]
        wrong = _first_wrong(bucket, starts, indices)
        unused = bool(parts.lower[total:].any())
    else:
        low = int(parts.header["low_bits"][0])
        indices = np.empty(total, np.uint32)
        wrong = elias_fano.decode(parts.lower, parts.upper, starts, bucket.offsets, low, indices)
        word, bit = divmod(total * low, 64)
        tail = parts.lower[word:]
        unused = len(tail) > 0 and bool(tail[0] >> np.uint64(bit) or tail[1:].any())
    if wrong >= 0:
        raise PayloadError(
            f"layer {bucket.layers[wrong].name!r}, payload of rank {rank}: indices do not ascend "
            f"within its {bucket.layers[wrong].size} entries"
        )
    if wrong != elias_fano.GOOD:
        number = "fewer" if wrong == elias_fano.TOO_FEW else "more"
        _refuse_payload(bucket, rank, "number of indices", f"{number} than {total}", total)
    if unused:
        _refuse_payload(bucket, rank, "room for further indices", "in use", "zero")
    return indices


# Both -------------------------------------------------------------------------------------------


def _checked_k(bucket: Bucket, k: np.ndarray) -> tuple[np.ndarray, int]:
    """k as int64, and the capacity it makes."""
    k = np.asarray(k, np.int64)
    if k.shape != (len(bucket.layers),) or k.min() < 0:
        raise DLSError(
            f"bucket {bucket.name!r} of {len(bucket.layers)} layers: k of shape {k.shape}, "
            f"{k.tolist()[:8]}"
        )
    return k, int(k.sum())


def _starts(entries: np.ndarray) -> np.ndarray:
    """Where each layer's entries begin: (L + 1,) int64."""
    starts = np.zeros(len(entries) + 1, np.int64)
    np.cumsum(entries, out=starts[1:])
    return starts
