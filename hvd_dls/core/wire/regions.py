"""What each owner has of a bucket, as a bucket of its own: it travels in the usual wire format."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

from hvd_dls.core.balancing.layers import LayerSpec
from hvd_dls.core.wire.dealing import Dealing
from hvd_dls.core.wire.layout import Bucket

# Entries of a layer for each of its pieces that has a sketch; at least so many have one.
_FOR_A_SKETCH, _SKETCHES = 16_384, 2


class Region(NamedTuple):
    """What one owner has of a bucket.

    Attributes:
        sent: the bucket of pieces, as ranks send them to the owner: without sketches.
        handed_out: the same, as the owner hands sums out: some have sketches, which are those of a
            sample of their layer.
    """

    sent: Bucket
    handed_out: Bucket

    @property
    def size(self) -> int:
        """Number of entries."""
        return self.sent.size


def regions_of(dealing: Dealing) -> list[Region]:
    """All owners' regions; the first owner hears of the watched layers."""
    bucket, regions = dealing.bucket, []
    sizes = dealing.sizes.tolist()
    for owner, (begin, end) in enumerate(pairwise(dealing.first.tolist())):
        pieces = tuple(_piece(dealing, number, sizes[number]) for number in range(begin, end))
        watched = bucket.watched if owner == 0 else ()
        sent = replace(bucket, layers=pieces, watched=watched, sketches=())
        sketches = tuple(n - begin for n in range(begin, end) if _has_sketch(dealing, n))
        regions.append(Region(sent, replace(sent, sketches=sketches)))
    return regions


def _has_sketch(dealing: Dealing, piece: int) -> bool:
    """Of which pieces of its layer: the first hands'."""
    size = dealing.bucket.layers[dealing.layers[piece]].size
    return bool(dealing.hand[piece] < max(size // _FOR_A_SKETCH, _SKETCHES))


def _piece(dealing: Dealing, number: int, size: int) -> LayerSpec:
    layer: LayerSpec = dealing.bucket.layers[dealing.layers[number]]
    if size == layer.size:
        return layer
    label = dealing.label(number)
    name, stable = f"{layer.name}[{label}]", f"{layer.stable_name}[{label}]"
    return replace(layer, name=name, stable_name=stable, shape=(size,))
