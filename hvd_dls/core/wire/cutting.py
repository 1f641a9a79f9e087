"""From what was found of a bucket's layers to owners' pieces, and from pieces to layers again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from hvd_dls.core.wire.dealing import Dealing
from hvd_dls.core.wire.elias_fano import GOOD
from hvd_dls.core.wire.layout import ABSENT, NOT_FINITE, SENT
from hvd_dls.core.wire.payload import Found, Payloads, first_wrong, starts_of
from hvd_dls.core.wire.strips import Pieces
from hvd_dls.errors import DLSError


class Cut(NamedTuple):
    """What a rank sends the owners of a bucket, piece by piece: S of them.

    Attributes:
        entries: (S,) of each.
        indices: (K,) uint32, in each piece from its own zero.
        values: (K,).
        places: (K,) of these entries among all that were found, layer by layer.
        found: how many that are.
    """

    entries: np.ndarray
    indices: np.ndarray
    values: np.ndarray
    places: np.ndarray
    found: int


def cut_out(dealing: Dealing, there: Sequence[Found | None], room: np.ndarray) -> Cut:
    """Cuts what was found into owners' pieces; what owners have no room for is left out.

    Args:
        dealing: of a bucket.
        there: what was found of each of its layers.
        room: (P,) entries, of each owner.

    Raises:
        DLSError: indices do not ascend within their layer.
    """
    of = dealing.bucket
    lengths = [0 if found is None else len(found.indices) for found in there]
    found = [x for x in there if x is not None]
    nothing = np.empty(0, of.layers[0].work_dtype)
    indices = np.concatenate([nothing.astype(np.uint32), *(x.indices for x in found)])
    values = np.concatenate([nothing, *(x.values for x in found)])
    layers = np.repeat(np.arange(len(lengths)), lengths)
    if first_wrong(of, starts_of(np.array(lengths)), indices) != GOOD:
        raise DLSError(f"bucket {of.name!r}: indices do not ascend within their layers")
    pieces, numbers = dealing.pieces_of(layers, indices)
    # Stable: in each piece in the order of the layer, which is that of the piece, too.
    n_pieces = int(dealing.first[-1])
    places = _stable_order(pieces, n_pieces)
    entries = np.bincount(pieces, minlength=n_pieces)
    cuts = starts_of(entries)[dealing.first]
    if len(left_out := _left_out(values[places], cuts, room)):
        places = np.delete(places, left_out)
        entries = np.bincount(pieces[places], minlength=n_pieces)
    return Cut(entries, numbers[places], values[places], places, len(indices))


def put_together(
    dealing: Dealing,
    pieces: Pieces,
    sketched: np.ndarray,
    named: Sequence[tuple[str, int]] = (),
) -> Payloads:
    """What all owners hand out of a bucket, as if one rank had sent it.

    Args:
        dealing: of the bucket.
        pieces: of all owners.
        sketched: (T,) those that have sketches.
        named: see ``Payloads``.
    """
    of, n = dealing.bucket, len(dealing.bucket.layers)
    # A layer is not finite if a piece is not, else it is sent if a piece is.
    status = np.full(n, ABSENT, np.uint8)
    status[dealing.layers[pieces.status == SENT]] = SENT
    status[dealing.layers[pieces.status == NOT_FINITE]] = NOT_FINITE
    number = np.repeat(np.arange(len(dealing.layers)), np.diff(pieces.starts))
    layers = dealing.layers[number]
    indices = dealing.indices_of(number, pieces.indices)
    # No two are alike; of 32 bits, because NumPy sorts these fastest.
    order = np.argsort((of.offsets[layers] + indices).astype(np.uint32))
    bases, counts = _sketches(dealing, pieces, sketched)
    return Payloads(
        pieces.headers[:1],
        pieces.watched[None],
        status[None],
        bases[None],
        counts[None],
        starts_of(np.bincount(layers, minlength=n)[None]),
        [(indices[order].astype(np.uint32), pieces.values[order])],
        from_owners=True,
        named=named,
    )


def _stable_order(numbers: np.ndarray, most: int) -> np.ndarray:
    """Places of small whole numbers, ascending, equal ones in order; a radix sort, if it can be."""
    small = numbers.astype(np.uint16) if most <= 1 << 16 else numbers
    return np.argsort(small, kind="stable")


def _left_out(values: np.ndarray, cuts: np.ndarray, room: np.ndarray) -> np.ndarray:
    """Places of the smallest entries, of those owners that have no room for all.

    Args:
        values: (K,) owner by owner.
        cuts: (P + 1,) where each owner's begin.
        room: (P,) entries.
    """
    over = np.diff(cuts) - room
    places = [np.empty(0, np.int64)]
    for owner in np.flatnonzero(over > 0).tolist():
        start, stop = cuts[owner : owner + 2].tolist()
        order = np.argsort(np.abs(values[start:stop]), kind="stable")
        places.append(start + order[: over[owner]])
    return np.concatenate(places)


def _sketches(
    dealing: Dealing, pieces: Pieces, sketched: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """One sketch for each of L layers, from those of some of its pieces: a sample of the layer.

    Args:
        dealing: of a bucket.
        pieces: of all owners.
        sketched: (T,) those that have sketches.

    Returns:
        (L,) first bins, from where on all of them are known, and (L, WINDOW) counts, as many as
        there would be of whole layers.
    """
    sent = pieces.status[sketched] == SENT
    own, counts = sketched[sent], pieces.counts[sent]
    layers, bases = dealing.layers[own], pieces.bases[own].astype(np.int64)
    n, window = len(dealing.bucket.layers), pieces.counts.shape[1]
    tops, sample = np.zeros(n, np.int64), np.zeros(n, np.int64)
    np.maximum.at(tops, layers, bases)
    np.add.at(sample, layers, dealing.sizes[own])
    # What lies beyond the window is in its last bin, and stays in sight.
    moved = np.minimum(tops[layers] - bases, window - 1)
    bins = np.arange(window) - moved[:, None]
    total, there = np.zeros((n, window), np.int64), bins >= 0
    rows = np.broadcast_to(layers[:, None], bins.shape)
    np.add.at(total, (rows[there], bins[there]), counts[there])
    whole = np.diff(dealing.bucket.offsets) / np.maximum(sample, 1)
    return tops, np.rint(total * whole[:, None]).astype(np.int64)
