"""Bytes of a payload, and the time of packing and unpacking it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from benchmarks.common.internals import (
    WINDOW,
    Bucket,
    LayerSpec,
    Sketch,
    elias_fano,
    pack,
    payload_bytes,
    unpack,
)
from benchmarks.wire.codes import entropy_bound, golomb_rice, u16_blocks

VALUE_BITS = {"float32": 32, "float16": 16, "bfloat16": 16}
SECONDS = 0.3  # at most about, for one median
SLACK = 1 / 32  # room a capacity may have above what is sent


class Found(NamedTuple):
    """What a layer sends: a stand-in for the result of ``find``."""

    indices: np.ndarray
    values: np.ndarray
    sketch: Sketch


def time_of(do: Callable[[], Any]) -> tuple[float, float, float]:
    """Measures a function; returns lower quartile, median and upper quartile, in seconds."""
    do()
    times: list[float] = []
    end = time.perf_counter() + SECONDS
    while len(times) < 7 or (time.perf_counter() < end and len(times) < 500):
        start = time.perf_counter()
        do()
        times.append(time.perf_counter() - start)
    low, middle, high = np.percentile(times, [25, 50, 75])
    return float(low), float(middle), float(high)


def measure(
    model: str,
    layers: list[LayerSpec],
    kind: str,
    density: float,
    positions: np.ndarray,
    rng: np.random.Generator,
) -> dict[str, Any]:
    """Measures one index set: its bytes, and the time of coding it.

    Args:
        model: name of the model.
        layers: of the model.
        kind: name of the index set.
        density: share of the entries that are sent.
        positions: ascending, in all layers one after another.
        rng: for values and sketches.

    Returns:
        The figures.
    """
    bucket = Bucket(tuple(layers))
    n, k_total = bucket.size, len(positions)
    starts = np.searchsorted(positions, bucket.offsets)
    k = np.diff(starts)
    values = rng.standard_normal(k_total).astype(np.float32)
    sketch = Sketch(1000, rng.integers(0, 100_000, WINDOW))
    found = [
        Found((positions[a:b] - offset).astype(np.uint32), values[a:b], sketch)
        for a, b, offset in zip(starts, starts[1:], bucket.offsets, strict=False)
    ]
    bits = {
        "bound": entropy_bound(n, k_total),
        "elias-fano": 8 * sum(elias_fano.lengths(n, k_total)) / k_total,
        "golomb-rice": golomb_rice(positions),
        "u16 blocks": u16_blocks(n, k_total),
        "u32": 32.0,
        "int64": 64.0,
    }
    row: dict[str, Any] = {
        "model": model,
        "n": n,
        "layers": len(layers),
        "set": kind,
        "density": density,
        "k": k_total,
        "index_bits": bits,
        "bytes": {},
        "bytes_with_slack": {},
        "nanoseconds": {"elias-fano": coder_times(bucket, found, starts)},
    }
    for name in VALUE_BITS:
        bucket = Bucket(tuple(layers), name)
        row["bytes"][name] = payload_bytes(bucket, k_total) / k_total
        room = min(n, math.ceil(k_total * (1 + SLACK)))
        row["bytes_with_slack"][name] = payload_bytes(bucket, room) / k_total
        row["nanoseconds"][name] = payload_times(bucket, k, found)
    row["nanoseconds"]["float32, plain"] = payload_times(
        Bucket(tuple(layers), "float32", "plain"), k, found
    )
    return row


def per_entry(times: tuple[float, float, float], k: int) -> list[float]:
    """Converts seconds to nanoseconds an entry."""
    return [1e9 * t / k for t in times]


def coder_times(bucket: Bucket, found: list[Found], starts: np.ndarray) -> dict[str, list[float]]:
    """Measures the Elias–Fano coder alone: quartiles of nanoseconds an entry."""
    indices = np.concatenate([f.indices for f in found])
    low = elias_fano.low_bits(bucket.size, len(indices))
    lower, upper = (
        np.zeros(n // 8, np.uint64) for n in elias_fano.lengths(bucket.size, len(indices))
    )
    decoded = np.empty_like(indices)

    def encode() -> None:
        lower[:], upper[:] = 0, 0
        answer = elias_fano.encode(indices, starts, bucket.offsets, low, lower, upper)
        assert answer == elias_fano.GOOD

    def decode() -> None:
        answer = elias_fano.decode(lower, upper, starts, bucket.offsets, low, decoded)
        assert answer == elias_fano.GOOD

    times = time_of(encode), time_of(decode)
    assert np.array_equal(indices, decoded)
    return {
        what: per_entry(t, len(indices))
        for what, t in zip(("encode", "decode"), times, strict=True)
    }


def payload_times(bucket: Bucket, k: np.ndarray, found: list[Found]) -> dict[str, list[float]]:
    """Measures ``pack`` and ``unpack`` for one rank: quartiles of nanoseconds an entry."""
    total = int(k.sum())
    gathered = pack(bucket, k, found).payload
    return {
        "pack": per_entry(time_of(lambda: pack(bucket, k, found)), total),
        "unpack": per_entry(time_of(lambda: unpack(bucket, k, gathered, 1)), total),
    }
