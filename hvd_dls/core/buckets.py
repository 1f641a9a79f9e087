"""Layers that travel together, fixed in advance."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hvd_dls.config import DLSConfig
from hvd_dls.core.layers import LayerSpec
from hvd_dls.core.payload import MAX_ENTRIES, Bucket


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
