"""What an entry that comes in costs: reading it, and adding it up."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.common.internals import (
    WINDOW,
    Bucket,
    LayerSpec,
    Payloads,
    Sketch,
    pack,
    sum_up,
    unpack,
)
from benchmarks.wire.measuring import Found, per_entry

ROUNDS = 9


def measure_receiving(
    layers: list[LayerSpec], density: float, ranks: int, seed: int = 0
) -> dict[str, Any]:
    """Measures a bucket of all layers, as it comes in from so many ranks.

    Returns:
        The figures; quartiles of nanoseconds an entry received. ``add`` is what adding up takes
        beyond what it takes if no rank has sent anything.
    """
    rng, bucket = np.random.default_rng(seed), Bucket(tuple(layers))
    k = np.maximum(np.round(density * np.diff(bucket.offsets)).astype(np.int64), 1)
    sketch = Sketch(1000, rng.integers(0, 100_000, WINDOW))

    def payload() -> np.ndarray:
        found = [
            Found(
                np.sort(rng.choice(layer.size, count, replace=False, shuffle=False)).astype("u4"),
                rng.standard_normal(count).astype(np.float32),
                sketch,
            )
            for layer, count in zip(layers, k.tolist(), strict=True)
        ]
        return pack(bucket, k, found).payload

    gathered = np.concatenate([payload() for _ in range(ranks)])
    payloads = unpack(bucket, k, gathered, ranks)
    sums = [np.zeros(layer.size, np.float32) for layer in layers]

    def add(what: Payloads | None) -> None:
        for position, into in enumerate(sums):
            sum_up(what.received(position) if what else [], 1 / ranks, into, into.dtype)

    times = in_turns(
        [lambda: unpack(bucket, k, gathered, ranks), lambda: add(payloads), lambda: add(None)]
    )
    entries = ranks * int(k.sum())
    return {
        "density": density,
        "ranks": ranks,
        "layers": len(layers),
        "entries": entries,
        "unpack": quartiles_of(times[0], entries),
        "add": quartiles_of(times[1] - times[2], entries),
        "both": quartiles_of(times[0] + times[1] - times[2], entries),
    }


def in_turns(work: list[Callable[[], Any]]) -> np.ndarray:
    """Measures seconds of each, a row each, in turns."""
    for do in work:
        do()
    times = np.empty((len(work), ROUNDS))
    for turn in range(ROUNDS):
        for row, do in enumerate(work):
            start = time.perf_counter()
            do()
            times[row, turn] = time.perf_counter() - start
    return times


def quartiles_of(times: np.ndarray, entries: int) -> list[float]:
    """Computes quartiles of nanoseconds an entry."""
    low, middle, high = np.percentile(times, [25, 50, 75]).tolist()
    return per_entry((low, middle, high), entries)
