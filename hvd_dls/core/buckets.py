"""Layers that travel together, fixed in advance, and how much room each group of them gets."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from hvd_dls.config import DLSConfig
from hvd_dls.core.layers import LayerSpec
from hvd_dls.core.payload import MAX_ENTRIES, Bucket

_SLACK = 0.01  # room above what is needed now, so that moving ratios seldom change a length
_WASTE = 1 / 8  # of the room may stay empty before it shrinks


def make_buckets(layers: Sequence[LayerSpec], config: DLSConfig) -> tuple[Bucket, ...]:
    """Groups layers in the order in which backward reaches them: last layer first.

    A group ends when its gradients are ``bucket_bytes``, and where the work dtype changes.  It
    follows from the model alone, so that ranks whose hooks fire in different orders send the same.
    """
    groups: list[list[LayerSpec]] = []
    room = entries = 0
    for layer in reversed(layers):
        length = layer.size * layer.itemsize
        fits = length <= room and entries + layer.size <= MAX_ENTRIES
        if not (groups and fits and groups[-1][0].work_dtype == layer.work_dtype):
            groups.append([])
            room, entries = config.bucket_bytes, 0
        groups[-1].append(layer)
        room -= length
        entries += layer.size
    return tuple(make_bucket(group, config) for group in groups)


def make_bucket(layers: Sequence[LayerSpec], config: DLSConfig) -> Bucket:
    """A bucket of these layers, all of one work dtype; float64 is sent as it is."""
    values = "float64" if layers[0].work_dtype == np.float64 else config.values
    return Bucket(tuple(layers), values, config.index_code)


def capacity_for(needed: int, size: int, current: int = 0) -> int:
    """Entries that a bucket's payload has room for: as before wherever that will do.

    Horovod negotiates anew whenever a payload's length changes, so small changes of ``needed``
    (entries to be sent; at most ``size``, the bucket's entries) leave it as it is.
    """
    if needed <= current and needed >= current * (1 - _WASTE):
        return current
    return min(size, math.ceil(needed * (1 + _SLACK)))
