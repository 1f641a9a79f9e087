"""Unpacking what all ranks sent of a bucket, and checking all there is to check."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import numpy as np

from hvd_dls.core.balancing.sketch import LAST_BASE
from hvd_dls.core.wire import elias_fano
from hvd_dls.core.wire.layout import (
    ABSENT,
    HEADER,
    SENT,
    Abandoned,
    Bucket,
    Parts,
    header_of,
    parts_of,
    payload_bytes,
)
from hvd_dls.core.wire.payload import Payloads, checked_k, first_wrong, joined, starts_of
from hvd_dls.core.wire.values import decode_counts, decode_values
from hvd_dls.errors import PayloadError


def unpack(
    bucket: Bucket, k: np.ndarray | int, gathered: np.ndarray, ranks: int | Sequence[int]
) -> Payloads:
    """Reads some ranks' payloads of one bucket and checks all there is to check.

    Args:
        bucket: whose payloads these should be.
        k: (L,) entries of each layer that is sent; or an int, the capacity alone: each rank says
            itself how many there are of each layer.
        gathered: (P * payload_bytes(bucket, k.sum()),) uint8, payloads in rank order.
        ranks: whose they are; or their number P, if they are those of the first ones.

    Returns:
        One payload a rank.

    Raises:
        DLSError: k is not one number a layer.
        PayloadError: the buffer is not that; the message names layer or bucket, rank, what was
            found and what was expected.
    """
    ranks = range(ranks) if isinstance(ranks, int) else ranks
    each, capacity = checked_k(bucket, k)
    length = payload_bytes(bucket, capacity)
    if gathered.dtype != np.uint8 or gathered.shape != (len(ranks) * length,):
        raise PayloadError(
            f"bucket {bucket.name!r}: gathered {gathered.size} items of {gathered.dtype}, expected "
            f"{len(ranks)} payloads of {length} bytes; are all ranks in the same step?"
        )
    if not gathered.flags.c_contiguous or gathered.__array_interface__["data"][0] % 8:
        gathered = gathered.copy()  # compiled loops read whole words
    parts = parts_of(bucket, capacity, gathered.reshape(len(ranks), length))
    _check_headers(bucket, capacity, parts.header, ranks)
    _check_records(bucket, each, parts, ranks)
    starts = starts_of(parts.records["entries"])
    bases = parts.records["sketch_base"]
    counts = decode_counts(parts.counts)
    values = _take_values(bucket, parts, starts, ranks)
    indices = _take_indices(bucket, parts, starts, ranks)
    return Payloads(
        parts.header[:, 0],
        parts.watched[:, : len(bucket.watched)],
        parts.records["status"],
        bases,
        counts,
        starts,
        list(zip(indices, values, strict=True)),
    )


def unpack_varying(bucket: Bucket, gathered: np.ndarray, world_size: int) -> Payloads:
    """Like ``unpack``, where each rank chose the entries of its layers, and so the length, itself.

    Raises:
        PayloadError: as ``unpack``.
    """
    payloads: list[Payloads] = []
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
        payloads.append(unpack(bucket, k, gathered[start : start + length], [rank]))
        start += length
    if start != len(gathered):
        raise PayloadError(
            f"bucket {bucket.name!r}: gathered {len(gathered)} bytes, expected {start} from "
            f"{world_size} ranks"
        )
    return joined(payloads)


def _check_headers(
    bucket: Bucket, capacity: int, headers: np.ndarray, ranks: Sequence[int]
) -> None:
    """Checks all fields of all ranks' headers but the number of entries and the clock."""
    expected = header_of(bucket, capacity)
    headers = headers[:, 0].copy()
    unknown = headers["abandoned"] > max(Abandoned)
    if unknown.any():
        row = int(np.argmax(unknown))
        _refuse_payload(bucket, ranks[row], "abandoned", headers["abandoned"][row], "0, 1 or 2")
    for field in ("entries", "step", "attempt", "abandoned"):
        headers[field] = 0
    if headers.tobytes() == expected.tobytes() * len(headers):
        return
    for rank, header in zip(ranks, headers, strict=True):
        for field in HEADER.names or ():
            if header[field] != expected[field]:
                _refuse_payload(bucket, rank, field, header[field], expected[field])


def _check_records(
    bucket: Bucket, k: np.ndarray | None, parts: Parts, ranks: Sequence[int]
) -> None:
    """Checks all ranks' records, and the number of entries in their headers."""
    records = parts.records
    status, bases, exponents = records["status"], records["sketch_base"], records["exponent"]

    def check(field: str, good: np.ndarray, wanted: object) -> None:
        _check_layers(bucket, field, records[field], good, wanted, ranks)

    check("status", (status >= SENT) & (status <= ABSENT), "1, 2 or 3")
    if k is None:
        # As many as there are at most, and together as many as there is room for.
        most = np.where(status == SENT, np.diff(bucket.offsets), 0)
        check("entries", records["entries"] <= most, most)
        expected = records["entries"].astype(np.int64)
        room, totals = int(parts.header["capacity"][0, 0]), expected.sum(axis=1)
        if (totals > room).any():
            rank = int(np.argmax(totals > room))
            _refuse_payload(bucket, ranks[rank], "entries", totals[rank], f"at most {room}")
    else:
        expected = np.where(status == SENT, k, 0)
        check("entries", records["entries"] == expected, expected)
    check("sketch_base", bases <= LAST_BASE, f"at most {LAST_BASE}")
    if bucket.values != "float16":
        check("exponent", exponents == 0, 0)
    watched, n = parts.watched, len(bucket.watched)
    good = (watched[:, :n] >= SENT) & (watched[:, :n] <= ABSENT)
    if not good.all() or watched[:, n:].any():
        rank = int(np.argmin(good.all(axis=1) & ~watched[:, n:].any(axis=1)))
        found = watched[rank].tolist()
        _refuse_payload(bucket, ranks[rank], "watched", found, f"1, 2 or 3, {n} times")
    entries, totals = parts.header["entries"][:, 0], expected.sum(axis=1)
    if (entries != totals).any():
        rank = int(np.argmax(entries != totals))
        _refuse_payload(bucket, ranks[rank], "entries", entries[rank], totals[rank])


def _check_layers(
    bucket: Bucket,
    field: str,
    found: np.ndarray,
    good: np.ndarray,
    expected: object,
    ranks: Sequence[int],
) -> None:
    if good.all():
        return
    rank, layer = np.argwhere(~good)[0]
    wanted = expected[rank, layer] if isinstance(expected, np.ndarray) else expected
    raise PayloadError(
        f"layer {bucket.layers[layer].name!r}, payload of rank {ranks[rank]}: {field} is "
        f"{found[rank, layer]}, expected {wanted}"
    )


def _refuse_payload(
    bucket: Bucket, rank: int, field: str, found: object, expected: object
) -> NoReturn:
    raise PayloadError(
        f"bucket {bucket.name!r}, payload of rank {rank}: {field} is {found}, expected {expected}; "
        "do all ranks run the same version and configuration?"
    )


def _take_values(
    bucket: Bucket, parts: Parts, starts: np.ndarray, ranks: Sequence[int]
) -> np.ndarray:
    """(P, C or more): all ranks' values, where there is room for them."""
    kind, totals = bucket.values, starts[:, -1]
    if kind == "float16":  # each rank's segments are scaled by themselves
        values = np.zeros(parts.values.shape, np.float32)
        for row, total in enumerate(totals.tolist()):
            exponents = parts.records["exponent"][row]
            sent = parts.values[row, :total]
            values[row, :total] = decode_values(sent, kind, exponents, starts[row])
    else:
        values = decode_values(parts.values, kind, parts.records["exponent"], starts)
    finite = np.isfinite(values)
    if not finite.all():
        row, where = np.argwhere(~finite)[0].tolist()
        if where < totals[row]:
            layer = int(np.searchsorted(starts[row], where, side="right")) - 1
            raise PayloadError(
                f"layer {bucket.layers[layer].name!r}, payload of rank {ranks[row]}: value "
                f"{where - starts[row, layer]} is {values[row, where]}, expected it to be finite"
            )
    room = parts.values.shape[1]
    if len(rows := np.flatnonzero(totals < room)):
        bits = parts.values[rows].view(np.dtype(f"u{parts.values.itemsize}"))
        in_use = ((np.arange(room) >= totals[rows, None]) & (bits != 0)).any(axis=1)
        if in_use.any():
            row = int(rows[np.argmax(in_use)])
            _refuse_payload(bucket, ranks[row], "room for further values", "in use", "zero")
    return values


def _take_indices(
    bucket: Bucket, parts: Parts, starts: np.ndarray, ranks: Sequence[int]
) -> np.ndarray:
    """(P, C): all ranks' indices, where there is room for them."""
    if bucket.code == "plain":
        indices = parts.lower
        codes = [_check_plain(bucket, parts.lower[row], starts[row]) for row in range(len(starts))]
    else:
        low = int(parts.header["low_bits"][0, 0])
        indices = np.empty((len(starts), int(parts.header["capacity"][0, 0])), np.uint32)
        codes = elias_fano.decode_all(
            parts.lower, parts.upper, starts, bucket.offsets, low, indices
        ).tolist()
    if any(code != elias_fano.GOOD for code in codes):
        row = next(row for row, code in enumerate(codes) if code != elias_fano.GOOD)
        _refuse_indices(bucket, ranks[row], codes[row], int(starts[row, -1]))
    return indices


def _check_plain(bucket: Bucket, room: np.ndarray, starts: np.ndarray) -> int:
    total = int(starts[-1])
    wrong = first_wrong(bucket, starts, room[:total])
    if wrong == elias_fano.GOOD and room[total:].any():
        return elias_fano.IN_USE
    return wrong


def _refuse_indices(bucket: Bucket, rank: int, code: int, total: int) -> NoReturn:
    if code >= 0:
        raise PayloadError(
            f"layer {bucket.layers[code].name!r}, payload of rank {rank}: indices do not ascend "
            f"within its {bucket.layers[code].size} entries"
        )
    if code == elias_fano.IN_USE:
        _refuse_payload(bucket, rank, "room for further indices", "in use", "zero")
    number = "fewer" if code == elias_fano.TOO_FEW else "more"
    _refuse_payload(bucket, rank, "number of indices", f"{number} than {total}", total)
