"""Layers that travel together, fixed in advance."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hvd_dls.config import SPARSE_ALLREDUCE, DLSConfig
from hvd_dls.core.balancing.layers import LayerSpec
from hvd_dls.core.wire.layout import MAX_ENTRIES, Bucket
from hvd_dls.errors import DLSError

USUAL_BYTES = 32 << 20  # of gradients that travel together
_MANY = 64  # senders, from which on a bucket's hops weigh more than its entries
_MOST = 1 << 30  # bytes; lengths of operations are counted in 32 bits


def bucket_bytes_of(config: DLSConfig, senders: int) -> int:
    """Gradient bytes that travel together: as given, or else by the number of ranks that send.

    Where owners add up, a bucket's entries take as long among many ranks as among few, but each of
    its operations takes P - 1 hops.  So buckets are larger, and fewer, the more ranks there are:
    then a step waits about as long for hops as among 64, until one bucket has all.  (By the cost
    model: docs/scale.md.  Where payloads are gathered, entries grow as hops do.)

    Args:
        config: the options.
        senders: P, ranks that send each bucket: of each host one, where hosts average first.
    """
    if config.bucket_bytes is not None:
        return config.bucket_bytes
    if config.exchange != SPARSE_ALLREDUCE or senders <= _MANY:
        return USUAL_BYTES
    return min(USUAL_BYTES * senders // _MANY, _MOST)


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
        limit: bytes; None for the options' ``bucket_bytes``, among few ranks.

    Raises:
        DLSError: strategy="global" with layers that do not fit into one group.
    """
    limit = bucket_bytes_of(config, 1) if limit is None else limit
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
            room, entries = limit, 0
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
