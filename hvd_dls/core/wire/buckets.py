"""Layers that travel together, fixed in advance."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hvd_dls.config import DLSConfig
from hvd_dls.core.balancing.layers import LayerSpec
from hvd_dls.core.wire.layout import MAX_ENTRIES, Bucket
from hvd_dls.errors import DLSError


def make_buckets(
    layers: Sequence[LayerSpec],
    sparse: Sequence[LayerSpec],
    config: DLSConfig,
    limit: int | None = None,
) -> tuple[Bucket, ...]:
    """Groups layers in the order in which backward reaches them: last layer first.

    A group ends when its gradients are ``limit`` bytes, and where the work dtype changes.  It
    follows from the model alone, so that ranks whose hooks fire in different orders send the same.
    A layer that goes dense is watched by the group of the next one that does not.

    Args:
        layers: all, in model order.
        sparse: those of them that are compressed.
        config: the options.
        limit: None for the options' ``bucket_bytes``.

    Raises:
        DLSError: strategy="global" with layers that do not fit into one group.
    """
    whole = config.strategy == "global"  # chooses among all layers, so they must travel together
    compressed = {layer.name for layer in sparse}
    groups: list[list[LayerSpec]] = []
    watched: list[list[str]] = []
    waiting: list[str] = []
    room = entries = 0
    for layer in reversed(layers):
        if layer.name not in compressed:
            waiting.append(layer.name)
            continue
        length = layer.size * layer.itemsize
        fits = (whole or length <= room) and entries + layer.size <= MAX_ENTRIES
        if not (groups and fits and groups[-1][0].work_dtype == layer.work_dtype):
            groups.append([])
            watched.append([])
            room, entries = config.bucket_bytes if limit is None else limit, 0
        groups[-1].append(layer)
        watched[-1] += waiting
        waiting = []
        room -= length
        entries += layer.size
    if groups:
        watched[-1] += waiting
    if whole and len(groups) > 1:
        raise DLSError(
            f"strategy='global' takes layers of one type, with fewer than {MAX_ENTRIES} entries "
            f"together; {groups[0][0].name!r} and {groups[1][0].name!r} cannot travel together"
        )
    return tuple(
        make_bucket(group, config, names) for group, names in zip(groups, watched, strict=True)
    )


def make_bucket(
    layers: Sequence[LayerSpec], config: DLSConfig, watched: Sequence[str] = ()
) -> Bucket:
    """A bucket of these layers, all of one work dtype; float64 is sent as it is."""
    values = "float64" if layers[0].work_dtype == np.float64 else config.values
    return Bucket(tuple(layers), values, config.index_code, tuple(watched))
