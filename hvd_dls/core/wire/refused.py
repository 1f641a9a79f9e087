"""What an owner hands out of a step that is refused: no sums, but which ranks have NaN or Inf.

Nothing of such a step counts, so the room that sums would have had, from that of values on, is
there to say it: P bits, one for each rank that sends to the owner, for each piece and then each
watched layer that is NOT_FINITE, in whole bytes; as many as there is room for.  No bit is set where
nobody said so: then a sum went beyond the type.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from hvd_dls.core.wire.layout import ABSENT, NOT_FINITE, Bucket, Clock, Status, parts_of, room_of
from hvd_dls.core.wire.pack import pack


class Named(NamedTuple):
    """What an owner handed out, and whom it named.

    Attributes:
        payload: uint8, without the names, for ``unpack``.
        where: a piece's number or, behind those of all pieces, a watched layer's; and the number
            of a rank among those that send.
    """

    payload: np.ndarray
    where: list[tuple[int, int]]


def pack_refused(
    bucket: Bucket,
    capacity: int,
    status: np.ndarray,
    watched: Mapping[str, Status],
    said: np.ndarray,
    clock: Clock,
) -> np.ndarray:
    """A payload of the usual length without sums: uint8.

    Args:
        bucket: what the owner hands out.
        capacity: of its payload.
        status: (L,) of its pieces.
        watched: status of watched layers that is not SENT, by name.
        said: (R, P) bool, of each piece, then each watched layer, that is NOT_FINITE: who said so.
        clock: of the step.
    """
    payload = pack(bucket, capacity, [ABSENT] * len(status), watched, clock).payload
    parts_of(bucket, capacity, payload).records["status"] = status
    rows, room = np.packbits(said, axis=1), room_of(bucket, capacity, payload)
    fits = min(len(rows), len(room) // rows.shape[1])
    room[: fits * rows.shape[1]] = rows[:fits].ravel()
    return payload


def take_names(bucket: Bucket, capacity: int, payload: np.ndarray, senders: int) -> Named:
    """Takes the names out of what an owner handed out, if there are any.

    Args:
        bucket: what the owner hands out.
        capacity: of its payload.
        payload: uint8, of the length that follows from these; otherwise as it came.
        senders: P, ranks that send to the owner.
    """
    payload = payload.copy()
    parts = parts_of(bucket, capacity, payload)
    told = np.concatenate([parts.records["status"], parts.watched[: len(bucket.watched)]])
    bad = np.flatnonzero(told == NOT_FINITE)
    room, each = room_of(bucket, capacity, payload), -(-senders // 8)
    if not len(bad) or parts.records["entries"].any():
        return Named(payload, [])
    fits = min(len(bad), len(room) // each)
    rows = room[: fits * each].reshape(fits, each)
    said = np.unpackbits(rows, axis=1, count=senders)
    rows[:] ^= np.packbits(said, axis=1)  # what is left over is none of it, and refused
    return Named(payload, [(int(bad[row]), rank) for row, rank in np.argwhere(said).tolist()])
