"""What an owner's work costs: reading what ranks sent, adding up, choosing the largest sums."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.common.internals import (
    WINDOW,
    Bucket,
    LayerSpec,
    Owners,
    Sketch,
    pack,
    unpack,
)
from benchmarks.wire.measuring import Found
from benchmarks.wire.receiving import in_turns, quartiles_of


def measure_owning(
    layers: list[LayerSpec], density: float, ranks: int, seed: int = 0
) -> dict[str, Any]:
    """Measures the first owner of a bucket of all layers, whose ranks each send it its share.

    Returns:
        The figures; quartiles of nanoseconds an entry received.
    """
    rng, whole = np.random.default_rng(seed), Bucket(tuple(layers))
    owners = Owners((whole,), ranks, 0, [True])
    total = round(density * whole.size)
    room, part = int(owners.room(0, total)[0]), owners.own(0).sent
    sketch, offsets = Sketch(1000, rng.integers(0, 100_000, WINDOW)), part.offsets

    def payload() -> np.ndarray:
        where = rng.choice(part.size, total // ranks, replace=False, shuffle=False)
        where.sort()
        found = []
        for start, stop in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
            own = where[np.searchsorted(where, start) : np.searchsorted(where, stop)] - start
            values = rng.standard_normal(len(own)).astype(np.float32)
            found.append(Found(own.astype(np.uint32), values, sketch))
        return pack(part, room, found).payload

    gathered = np.concatenate([payload() for _ in range(ranks)])
    payloads = unpack(part, room, gathered, ranks)
    times = in_turns(
        [lambda: unpack(part, room, gathered, ranks), lambda: owners.merge(0, payloads, total)]
    )
    entries = ranks * (total // ranks)
    return {
        "density": density,
        "ranks": ranks,
        "entries": entries,
        "owned": part.size,
        "unpack": quartiles_of(times[0], entries),
        "merge": quartiles_of(times[1], entries),
    }
