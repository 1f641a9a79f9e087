"""A bucket's entries, split among owners: each has a region, a run of neighbouring entries.

A region is a bucket of pieces of layers, so that what travels of it has the usual wire format.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from hvd_dls.core.balancing.layers import LayerSpec
from hvd_dls.core.balancing.shares import even_bounds
from hvd_dls.core.wire.layout import Bucket
from hvd_dls.errors import DLSError


class Region(NamedTuple):
    """What one owner has of a bucket.

    Attributes:
        sent: the bucket of pieces, as ranks send them to the owner: without sketches.
        handed_out: the same, as the owner hands sums out.
        layers: (pieces,) each one's layer, by its number in the whole bucket.
        begins: (pieces,) where each begins in its layer.
        start, stop: of the region in the whole bucket.
    """

    sent: Bucket
    handed_out: Bucket
    layers: np.ndarray
    begins: np.ndarray
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Number of entries."""
        return self.stop - self.start


class Edges(NamedTuple):
    """The S pieces of all regions of a bucket, one after the other.

    Attributes:
        starts: (S + 1,) where each begins in the whole bucket, and where the last one ends.
        layers: (S,) each one's layer, by its number there.
        begins: (S,) where each begins in its layer.
    """

    starts: np.ndarray
    layers: np.ndarray
    begins: np.ndarray


def edges_of(bucket: Bucket, regions: Sequence[Region]) -> Edges:
    """Where the pieces of a bucket's regions are."""
    layers = np.concatenate([region.layers for region in regions])
    begins = np.concatenate([region.begins for region in regions])
    return Edges(np.append(bucket.offsets[layers] + begins, bucket.size), layers, begins)


def bounds_of(bucket: Bucket, owners: int, k: np.ndarray) -> np.ndarray:
    """Where regions begin at first: each gets as much of what is sent then, and of all entries.

    Args:
        bucket: to be split.
        owners: number of regions.
        k: (L,) entries that its layers send at first.

    Returns:
        (owners + 1,) int64, ascending; no region is empty.

    Raises:
        DLSError: the bucket has fewer entries than there are owners.
    """
    if bucket.size < owners:
        raise DLSError(
            f"exchange='sparse_allreduce': bucket {bucket.name!r} of {bucket.size} entries cannot "
            f"be split among {owners} ranks; raise dense_below, so that its layers go dense"
        )
    sizes, k = np.diff(bucket.offsets), np.asarray(k, np.float64)
    weights = sizes / bucket.size + k / max(float(k.sum()), 1.0)
    return even_bounds(bucket.offsets, weights, owners)


def regions_of(bucket: Bucket, bounds: Sequence[int] | np.ndarray) -> list[Region]:
    """A bucket's regions; the first one's owner hears of the watched layers.

    Args:
        bucket: to be split.
        bounds: where regions begin, and the bucket's size.
    """
    regions = []
    for number, (start, stop) in enumerate(pairwise(map(int, bounds))):
        first = int(np.searchsorted(bucket.offsets, start, side="right")) - 1
        last = int(np.searchsorted(bucket.offsets, stop, side="left")) - 1
        layers = np.arange(first, last + 1)
        begins = np.maximum(start - bucket.offsets[layers], 0)
        ends = np.minimum(stop - bucket.offsets[layers], np.diff(bucket.offsets)[layers])
        pieces = tuple(
            _piece(bucket.layers[layer], int(begin), int(end))
            for layer, begin, end in zip(layers, begins, ends, strict=True)
        )
        watched = bucket.watched if number == 0 else ()
        sent = replace(bucket, layers=pieces, watched=watched, sketches=False)
        region = Region(sent, replace(sent, sketches=True), layers, begins, start, stop)
        regions.append(region)
    return regions


def _piece(layer: LayerSpec, begin: int, end: int) -> LayerSpec:
    if end - begin == layer.size:
        return layer
    name = f"{layer.name}[{begin}:{end}]"
    stable = f"{layer.stable_name}[{begin}:{end}]"
    return replace(layer, name=name, stable_name=stable, shape=(end - begin,))
