"""Bytes and time that an entry costs on the wire, beside the entropy bound and other codes.

    python -m benchmarks.wire --json build/wire.json --picture build/wire.png

Index sets: "uniform", K of n at random, which is what the bound is for; "clustered", the largest of
Gaussian gradients whose layers, rows and columns differ in scale; "digits", the largest entries of
a small network's gradient in its training (needs torch and scikit-learn, left out otherwise).

Bytes of this format are those of whole payloads, headers and sketches included, over K, for a
capacity of just K and for one with slack; of the bound and the other codes, those of indices and
values alone. Times are medians of `pack` and of `unpack` for one rank, values included, and of the
Elias–Fano coder alone, in nanoseconds an entry, with the interquartile range behind; one thread.
Then what a received entry costs where many ranks send: `unpack` of all ranks' payloads of ResNet-50
in one bucket, and adding them up, beyond what the sums of nothing take; and what it costs an owner
(exchange="sparse_allreduce"), which reads, adds up and chooses what to hand out.
"""

from __future__ import annotations

import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.command_line import add_output_options, make_parser
from benchmarks.common.internals import HAVE_NUMBA
from benchmarks.common.reporting import markdown, pyplot, save_picture, write_json
from benchmarks.wire.index_sets import (
    MODELS,
    clustered_gradient,
    digits_gradient,
    largest,
    resnet50_matrices,
    uniform,
)
from benchmarks.wire.measuring import VALUE_BITS, measure
from benchmarks.wire.owning import measure_owning
from benchmarks.wire.receiving import measure_receiving

DENSITIES = [1e-4, 1e-3, 1e-2, 1e-1]

RECEIVED = [(density, ranks) for density in (1e-3, 1e-2) for ranks in (4, 16, 64)]
PARTS = ("unpack", "add", "both")
OWNING = (4, 16, 64)

# Bytes an entry that the format was designed for: density, value bits -> at most.
TARGETS = {(1e-2, 32): 5.3, (1e-2, 16): 3.3, (1e-3, 32): 5.8, (1e-3, 16): 3.8}


def measure_all(models: list[str], seed: int) -> list[dict[str, Any]]:
    """Measures all index sets of all models; returns a row of figures for each."""
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


def name_of(row: dict[str, Any]) -> list[str]:
    """Returns the first cells of a row, which say what was measured."""
    return [row["model"], row["set"], f"{row['density']:g}", f"{row['k']:,}"]


def show_bytes(rows: list[dict[str, Any]]) -> None:
    """Prints bytes an entry, beside other codes and the bound."""
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
    """Prints nanoseconds an entry."""
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


def show_receiving(rows: list[dict[str, Any]]) -> None:
    """Prints what an entry that comes in costs, in nanoseconds."""
    lines = []
    for row in rows:
        cells = (f"{row[what][1]:.1f} ({row[what][0]:.1f}–{row[what][2]:.1f})" for what in PARTS)
        lines.append([f"{row['density']:g}", f"{row['ranks']}", f"{row['entries']:,}", *cells])
    print("Nanoseconds an entry received: ResNet-50, float32\n")
    print(markdown(["density", "ranks", "entries", *PARTS], lines))


def show_owning(rows: list[dict[str, Any]]) -> None:
    """Prints what an entry that comes in costs an owner, in nanoseconds."""
    lines = []
    for row in rows:
        cells = (
            f"{row[what][1]:.1f} ({row[what][0]:.1f}–{row[what][2]:.1f})"
            for what in ("unpack", "merge")
        )
        counts = (f"{row['entries']:,}", f"{row['owned']:,}")
        lines.append([f"{row['density']:g}", f"{row['ranks']}", *counts, *cells])
    print("Nanoseconds an entry received by an owner: ResNet-50, float32\n")
    head = ["density", "ranks", "entries", "owned", "unpack", "add up and choose"]
    print(markdown(head, lines))


def show_targets(rows: list[dict[str, Any]]) -> bool:
    """Prints which TARGETS were met; returns whether all were."""
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
    """Draws bytes an entry over the density, for uniform index sets of the first model."""
    first = rows[0]["model"]
    rows = [row for row in rows if row["model"] == first and row["set"] == "uniform"]
    x = [row["density"] for row in rows]
    figure, axes = pyplot().subplots(1, 2, figsize=(11, 5), sharey=True)
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
    save_picture(figure, path)


def main() -> None:
    """Measures all index sets and shows the figures; fails if a target was missed."""
    parser = make_parser("wire", __doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--seed", type=int, default=0)
    add_output_options(parser)
    args = parser.parse_args()
    rows = measure_all(args.models, args.seed)
    show_bytes(rows)
    show_times(rows)
    show_receiving(received := [measure_receiving(resnet50_matrices(), *x) for x in RECEIVED])
    show_owning(owning := [measure_owning(resnet50_matrices(), 1e-2, n) for n in OWNING])
    met = show_targets(rows)
    if args.json:
        about = {"numba": HAVE_NUMBA, "numpy": np.__version__, "python": platform.python_version()}
        write_json(
            {"about": about, "rows": rows, "received": received, "owning": owning}, args.json
        )
    if args.picture:
        draw(rows, args.picture)
    sys.exit(not met)


if __name__ == "__main__":
    main()
