"""Headers alone: of ranks that leave it to another to send; and those of payloads that do not fit.

Where ranks are grouped, one of each group sends a bucket's payload, for all; inside the group, each
of the others sends a header alone, with a magic of its own: so it tells in which step it is, and
whether it gave it up.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hvd_dls.core.wire.layout import (
    HEADER,
    START,
    Abandoned,
    Bucket,
    Clock,
    header_of,
    payload_bytes,
)
from hvd_dls.core.wire.payload import Told, told_by
from hvd_dls.errors import PayloadError

ALONE = b"DLH"  # magic of a header without a payload
_OWN = ("entries", "step", "attempt", "abandoned")  # what ranks may differ in


class Split(NamedTuple):
    """What a group's ranks handed on to each other, taken apart."""

    payloads: np.ndarray  # (length,) uint8
    told: list[Told]  # by the ranks of the group but the one that handed the payloads on


def pack_header(
    bucket: Bucket, capacity: int, clock: Clock = START, abandoned: Abandoned = Abandoned.NO
) -> np.ndarray:
    """What a rank sends inside its group: (40,) uint8.

    Args:
        bucket: that another rank of the group sends.
        capacity: of its payload.
        clock: of the step.
        abandoned: whether this rank has given the step up.
    """
    header = header_of(bucket, capacity, clock=clock)
    header["magic"] = ALONE
    header["abandoned"] = abandoned
    return np.frombuffer(header.tobytes(), np.uint8).copy()


def split(
    bucket: Bucket, capacity: int, gathered: np.ndarray, ranks: int, owner: int, length: int
) -> Split:
    """Takes apart what the ranks of a group handed on: one all groups' payloads, others a header.

    Args:
        bucket: whose payloads these should be.
        capacity: that headers tell.
        gathered: uint8, in rank order.
        ranks: in the group.
        owner: number among them of the one that handed on the payloads.
        length: bytes of all payloads.

    Raises:
        PayloadError: the buffer is not that.
    """
    each = HEADER.itemsize
    if gathered.dtype != np.uint8 or gathered.shape != ((ranks - 1) * each + length,):
        raise PayloadError(
            f"bucket {bucket.name!r}: gathered {gathered.size} items of {gathered.dtype}, expected "
            f"{length} bytes of payloads and {ranks - 1} headers of {each}; are all ranks in the "
            "same step?"
        )
    start, stop = owner * each, owner * each + length
    raw = np.concatenate([gathered[:start], gathered[stop:]])
    told = []
    for header in raw.view(HEADER):
        if not _fits(bucket, header) or header["capacity"] != capacity or header["entries"]:
            raise PayloadError(
                f"bucket {bucket.name!r}: a header of {header.tolist()} inside the host; do all "
                "ranks run the same version and configuration?"
            )
        told.append(told_by(header))
    return Split(gathered[start:stop], told)


def headers_in(bucket: Bucket, gathered: np.ndarray) -> tuple[list[Told], list[Told]]:
    """What is told by what ranks sent, if no more is sure than that it is payloads or headers.

    Args:
        bucket: whose they should be.
        gathered: uint8, in rank order, each as long as it says.

    Returns:
        What payloads tell, and what headers alone do; nothing if they are something else.
    """
    payloads: list[Told] = []
    alone: list[Told] = []
    start = 0
    while start < len(gathered):
        raw = gathered[start : start + HEADER.itemsize]
        if raw.dtype != np.uint8 or len(raw) < HEADER.itemsize:
            return [], []
        header = raw.copy().view(HEADER)[0]
        if not _fits(bucket, header):
            return [], []
        by_itself = bytes(header["magic"]) == ALONE
        (alone if by_itself else payloads).append(told_by(header))
        start += HEADER.itemsize if by_itself else payload_bytes(bucket, int(header["capacity"]))
    return (payloads, alone) if start == len(gathered) else ([], [])


def told_around(
    bucket: Bucket, first: Bucket, gathered: np.ndarray, ranks: int, owner: int
) -> list[Told]:
    """What is told by what ranks of a group handed on, of whatever length payloads are.

    Args:
        bucket: of the headers alone.
        first: whose payload comes first of those that were handed on.
        gathered: uint8, in rank order.
        ranks: in the group.
        owner: number among them of the one that handed on payloads.

    Returns:
        What the first payload tells, then the others' headers alone; nothing if they are none.
    """
    each = HEADER.itemsize
    start, stop = owner * each, len(gathered) - (ranks - 1 - owner) * each
    if gathered.dtype != np.uint8 or stop < start + each:
        return []
    around = np.concatenate([gathered[:start], gathered[stop:]]).view(HEADER)
    header = gathered[start : start + each].copy().view(HEADER)[0]
    alone = all(_fits(bucket, x) and bytes(x["magic"]) == ALONE for x in around)
    if not alone or not _fits(first, header) or bytes(header["magic"]) == ALONE:
        return []
    return [told_by(header), *map(told_by, around)]


def _fits(bucket: Bucket, header: np.void) -> bool:
    """Whether all fields are as they should be, but those that ranks may differ in."""
    expected = header_of(bucket, int(header["capacity"]))
    if bytes(header["magic"]) == ALONE:
        expected["magic"] = ALONE
    fields = [field for field in HEADER.names or () if field not in _OWN]
    return header["abandoned"] <= max(Abandoned) and all(header[f] == expected[f] for f in fields)
