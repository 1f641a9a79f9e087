"""Packing what a rank sends of a bucket."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from hvd_dls.core.balancing.sketch import WINDOW
from hvd_dls.core.wire import elias_fano
from hvd_dls.core.wire.layout import (
    ABSENT,
    NOT_FINITE,
    SENT,
    START,
    Abandoned,
    Bucket,
    Clock,
    Parts,
    Status,
    header_of,
    parts_of,
    payload_bytes,
)
from hvd_dls.core.wire.payload import Found, Packed, checked_k, first_wrong, starts_of
from hvd_dls.core.wire.values import encode_counts, round_values
from hvd_dls.errors import DLSError


def pack(
    bucket: Bucket,
    k: np.ndarray | int,
    found: Sequence[Found | Literal[Status.ABSENT] | None],
    watched: Mapping[str, Status] | None = None,
    clock: Clock = START,
) -> Packed:
    """Writes one payload.

    Args:
        bucket: whose entries these are.
        k: (L,) entries of each layer; their sum is the payload's capacity.  Or that alone: layers
            may have any number of entries, as long as there is room.
        found: of each layer its k entries, and a sketch if it is to have one; None if its gradient
            was not finite; ABSENT if it takes no part in this step.
        watched: status of those of the bucket's watched layers that is not SENT, by name.
        clock: of the step.

    Returns:
        The payload, of ``payload_bytes(bucket, k.sum())``, and the rounding errors, which belong
        back into the residuals.

    Raises:
        DLSError: there is not the right number of layers or entries, or indices do not ascend or
            leave their layer.
    """
    each, capacity = checked_k(bucket, k)
    status = [NOT_FINITE if f is None else ABSENT if f is ABSENT else SENT for f in found]
    if len(status) != len(bucket.layers):
        raise DLSError(
            f"bucket {bucket.name!r}: {len(status)} layers found, expected {len(bucket.layers)}"
        )
    sent = [f for f in found if f is not None and f is not ABSENT]
    entries = np.zeros(len(status), np.int64)
    rows = np.flatnonzero(np.array(status) == SENT)
    entries[rows] = [len(f.indices) for f in sent]
    starts = starts_of(entries)
    _check_entries(bucket, each, capacity, entries, rows)

    payload = np.zeros(payload_bytes(bucket, capacity), np.uint8)
    parts = parts_of(bucket, capacity, payload)
    parts.header[0] = header_of(bucket, capacity, int(starts[-1]), clock)
    told = watched or {}
    parts.watched[: len(bucket.watched)] = [told.get(name, SENT) for name in bucket.watched]
    parts.records["status"] = status
    parts.records["entries"] = entries
    has_sketch = frozenset(bucket.sketched.tolist())
    if not sent:
        return Packed(payload, [None] * len(status))
    sketches = [(n, f.sketch) for n, f in zip(rows.tolist(), sent, strict=True) if n in has_sketch]
    if sketches:
        where = np.array([number for number, _ in sketches])
        parts.records["sketch_base"][where] = [sketch.base for _, sketch in sketches]
        counts = np.concatenate([sketch.counts for _, sketch in sketches]).reshape(-1, WINDOW)
        parts.counts[np.searchsorted(bucket.sketched, where)] = encode_counts(counts)
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


def pack_abandoned(
    bucket: Bucket, k: np.ndarray | int, clock: Clock, why: Abandoned = Abandoned.GIVEN_UP
) -> np.ndarray:
    """A payload of the usual length that says that this rank has given the step up: uint8.

    Args:
        bucket: of which nothing is sent.
        k: (L,) entries of each layer that the others expect; or the capacity alone.
        clock: of the step.
        why: this rank has; or rather those that it sends for are in different steps.
    """
    absent = dict.fromkeys(bucket.watched, ABSENT)
    payload = pack(bucket, k, [ABSENT] * len(bucket.layers), absent, clock).payload
    parts_of(bucket, int(np.sum(k)), payload).header["abandoned"] = why
    return payload


def _check_entries(
    bucket: Bucket, k: np.ndarray | None, capacity: int, entries: np.ndarray, rows: np.ndarray
) -> None:
    if k is None:
        if entries.sum() > capacity:
            raise DLSError(
                f"bucket {bucket.name!r}: {entries.sum()} entries found, room is for {capacity}"
            )
        return
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
        wrong = first_wrong(bucket, starts, indices)
        parts.lower[: len(indices)] = indices
    else:
        low = int(parts.header["low_bits"][0])
        wrong = elias_fano.encode(indices, starts, bucket.offsets, low, parts.lower, parts.upper)
    if wrong != elias_fano.GOOD:
        raise DLSError(
            f"layer {bucket.layers[wrong].name!r}: indices do not ascend within its "
            f"{bucket.layers[wrong].size} entries"
        )
