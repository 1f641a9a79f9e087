#!/usr/bin/env python3
"""Bytes and nanoseconds an entry sent costs on the wire, beside the entropy bound and other codes.

    python -m benchmarks.wire --json build/wire.json --picture build/wire.png

Index sets: "uniform", K of n at random, which is what the bound is for; "clustered", the largest of
Gaussian gradients whose layers, rows and columns differ in scale; "digits", the largest entries of
a small network's gradient in its training (needs torch and scikit-learn, left out otherwise).

Bytes of this format are those of whole payloads, headers and sketches included, over K, for a
capacity of just K and for one with slack; of the bound and the other codes, those of indices and
values alone. Times are medians of `pack` and of `unpack` for one rank, values included, and of the
Elias–Fano coder alone, in nanoseconds an entry, with the interquartile range behind; one thread.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.common.reporting import markdown
from hvd_dls.core.balancing.layers import LayerSpec, layer_spec
from hvd_dls.core.balancing.sketch import WINDOW, Sketch
from hvd_dls.core.jit import HAVE_NUMBA
from hvd_dls.core.wire import elias_fano
from hvd_dls.core.wire.payload import Bucket, pack, payload_bytes, unpack

DENSITIES = [1e-4, 1e-3, 1e-2, 1e-1]
VALUE_BITS = {"float32": 32, "float16": 16, "bfloat16": 16}
SECONDS = 0.3  # at most about, for one median
SLACK = 1 / 32  # room a capacity may have above what is sent

# Bytes an entry that the format was designed for: density, value bits -> at most.
TARGETS = {(1e-2, 32): 5.3, (1e-2, 16): 3.3, (1e-3, 32): 5.8, (1e-3, 16): 3.8}


class Found(NamedTuple):
    indices: np.ndarray
    values: np.ndarray
    sketch: Sketch


def resnet50() -> list[LayerSpec]:
    """The convolutions and the classifier: 54 layers, 25.5 million entries."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7)]
    inputs = 64
    for blocks, width in ((3, 64), (4, 128), (6, 256), (3, 512)):
        for block in range(blocks):
            shapes += [(width, inputs, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            if block == 0:
                shapes.append((4 * width, inputs, 1, 1))
            inputs = 4 * width
    shapes.append((1000, inputs))
    return [layer_spec(f"layer{i}", shape) for i, shape in enumerate(shapes)]


MODELS = {
    "ResNet-50": resnet50,
    "one layer, 25M": lambda: [layer_spec("layer", (5000, 5000))],
    "one layer, 1M": lambda: [layer_spec("layer", (1000, 1000))],
    "one layer, 100k": lambda: [layer_spec("layer", (1000, 100))],
}


# Index sets: ascending positions in all layers one after another ---------------------------------


def uniform(n: int, k: int, rng: np.random.Generator) -> np.ndarray:
    return np.sort(rng.choice(n, k, replace=False, shuffle=False))


def clustered_gradient(layers: list[LayerSpec], rng: np.random.Generator) -> np.ndarray:
    parts = []
    for layer in layers:
        rows = layer.shape[0]
        columns = layer.size // rows
        scales = np.exp(rng.normal(0, 1, (rows, 1))) * np.exp(rng.normal(0, 1, (1, columns)))
        gradient = rng.standard_normal((rows, columns), np.float32) * scales.astype(np.float32)
        parts.append(gradient.ravel() * np.float32(np.exp(rng.normal(0, 0.5))))
    return np.concatenate(parts)


def digits_gradient(steps: int = 30) -> tuple[list[LayerSpec], np.ndarray] | None:
    """Layers and mean gradient of a network that is learning handwritten digits."""
    try:
        import torch
        from sklearn.datasets import load_digits
    except ImportError:
        return None
    torch.manual_seed(0)
    torch.set_num_threads(1)
    data = load_digits()
    images = torch.tensor(data.data / 16, dtype=torch.float32)
    labels = torch.tensor(data.target)
    model = torch.nn.Sequential(
        torch.nn.Linear(64, 1024),
        torch.nn.ReLU(),
        torch.nn.Linear(1024, 1024),
        torch.nn.ReLU(),
        torch.nn.Linear(1024, 10),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(steps):
        batch = slice(step * 32, (step + 1) * 32)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
    weights = [(n, p) for n, p in model.named_parameters() if p.dim() == 2]
    layers = [layer_spec(name, tuple(p.shape)) for name, p in weights]
    gradients = [p.grad.numpy().ravel() for _, p in weights if p.grad is not None]
    return layers, np.concatenate(gradients)


def largest(gradient: np.ndarray, k: int) -> np.ndarray:
    return np.sort(np.argpartition(np.abs(gradient), len(gradient) - k)[-k:])


# Bits an index, other codes and the bound ---------------------------------------------------------


def entropy_bound(n: int, k: int) -> float:
    """log2(binomial(n, k)) / k."""
    logs = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    return logs / math.log(2) / k


def u16_blocks(n: int, k: int) -> float:
    """A 16-bit offset for each entry and a 32-bit count for each 65,536 positions."""
    return 16 + 32 * math.ceil(n / 65_536) / k


def golomb_rice(positions: np.ndarray) -> float:
    """Gaps in unary above b bits and binary below, with the best b."""
    gaps = np.diff(positions, prepend=-1) - 1
    return min(b + 1 + float((gaps >> b).mean()) for b in range(33))


# One row of the table -----------------------------------------------------------------------------


def time_of(do: Callable[[], Any]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile, in seconds."""
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
    return [1e9 * t / k for t in times]


def coder_times(bucket: Bucket, found: list[Found], starts: np.ndarray) -> dict[str, list[float]]:
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
    total = int(k.sum())
    gathered = pack(bucket, k, found).payload
    return {
        "pack": per_entry(time_of(lambda: pack(bucket, k, found)), total),
        "unpack": per_entry(time_of(lambda: unpack(bucket, k, gathered, 1)), total),
    }


def measure_all(models: list[str], seed: int) -> list[dict[str, Any]]:
    rows = []
    for model in models:
        print(f"{model} ...", file=sys.stderr)
        layers = MODELS[model]()
        n = sum(layer.size for layer in layers)
        gradient = clustered_gradient(layers, np.random.default_rng(seed))
        for density in DENSITIES:
            rng, k = np.random.default_rng(seed), round(density * n)
            sets = {"uniform": uniform(n, k, rng), "clustered": largest(gradient, k)}
            for kind, positions in sets.items():
                rows.append(measure(model, layers, kind, density, positions, rng))
    if made := digits_gradient():
        layers, gradient = made
        for density in DENSITIES:
            positions = largest(gradient, round(density * len(gradient)))
            rng = np.random.default_rng(seed)
            rows.append(measure("MLP, 1.1M", layers, "digits", density, positions, rng))
    return rows


# What is shown ------------------------------------------------------------------------------------


def name_of(row: dict[str, Any]) -> list[str]:
    return [row["model"], row["set"], f"{row['density']:g}", f"{row['k']:,}"]


def show_bytes(rows: list[dict[str, Any]]) -> None:
    others = ["bound", "golomb-rice", "u16 blocks", "u32", "int64"]
    head = ["model", "set", "density", "K", "ours: fp32", "with slack", "entries alone", *others]
    head += ["ours: 16 bit", "with slack", "bound"]
    lines = []
    for row in rows:
        cells = [row[what]["float32"] for what in ("bytes", "bytes_with_slack")]
        cells += [(row["index_bits"][code] + 32) / 8 for code in ("elias-fano", *others)]
        cells += [row[what]["bfloat16"] for what in ("bytes", "bytes_with_slack")]
        cells.append((row["index_bits"]["bound"] + 16) / 8)
        lines.append([*name_of(row), *(f"{cell:.2f}" for cell in cells)])
    print("Bytes an entry\n")
    print(markdown(head, lines))


def show_times(rows: list[dict[str, Any]]) -> None:
    columns = [("elias-fano", "encode"), ("elias-fano", "decode")]
    columns += [
        (kind, what)
        for kind in ("float32", "float32, plain", "float16", "bfloat16")
        for what in ("pack", "unpack")
    ]
    lines = []
    for row in rows:
        times = (row["nanoseconds"][kind][what] for kind, what in columns)
        cells = (f"{middle:.1f} ({low:.1f}–{high:.1f})" for low, middle, high in times)
        lines.append([*name_of(row), *cells])
    print("Nanoseconds an entry\n")
    head = ["model", "set", "density", "K", *(f"{kind}: {what}" for kind, what in columns)]
    print(markdown(head, lines))


def show_targets(rows: list[dict[str, Any]]) -> bool:
    met = True
    for row in rows:
        for kind, bits in VALUE_BITS.items():
            most = TARGETS.get((row["density"], bits))
            if most and row["n"] > 20_000_000:
                good = row["bytes"][kind] <= most
                met &= good
                print(
                    f"{'met   ' if good else 'MISSED'} {row['model']}, {row['set']}, "
                    f"{row['density']:g}, {kind}: {row['bytes'][kind]:.3f} <= {most}"
                )
    return met


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    first = rows[0]["model"]
    rows = [row for row in rows if row["model"] == first and row["set"] == "uniform"]
    x = [row["density"] for row in rows]
    figure, axes = plt.subplots(1, 2, figsize=(11, 5), sharey=True)
    for axis, kind in zip(axes, ("float32", "bfloat16"), strict=True):
        value = VALUE_BITS[kind]
        axis.plot(x, [row["bytes"][kind] for row in rows], "o-", lw=2.5, label="this format, whole")
        codes = {
            "elias-fano": "entries alone",
            "golomb-rice": "Golomb–Rice",
            "u16 blocks": "16-bit offsets in blocks",
            "u32": "32-bit indices",
            "int64": "64-bit indices (GRACE)",
        }
        for code, label in codes.items():
            y = [(row["index_bits"][code] + value) / 8 for row in rows]
            axis.plot(x, y, ".--", lw=1, label=label)
        bound = [(row["index_bits"]["bound"] + value) / 8 for row in rows]
        axis.plot(x, bound, "k:", label="entropy bound")
        axis.set(xscale="log", xlabel="density", title=f"values in {kind}")
        axis.set_ylim(0, 12.5)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("bytes an entry")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncols=3)
    figure.suptitle(f"{first}: {rows[0]['n'] / 1e6:.1f}M entries in {rows[0]['layers']} layers")
    figure.tight_layout(rect=(0, 0.1, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where to write all figures")
    parser.add_argument("--picture", type=Path, help="where to draw bytes an entry (matplotlib)")
    args = parser.parse_args()
    rows = measure_all(args.models, args.seed)
    show_bytes(rows)
    show_times(rows)
    met = show_targets(rows)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        about = {"numba": HAVE_NUMBA, "numpy": np.__version__, "python": platform.python_version()}
        args.json.write_text(json.dumps({"about": about, "rows": rows}, indent=1))
    if args.picture:
        draw(rows, args.picture)
    sys.exit(not met)


if __name__ == "__main__":
    main()
