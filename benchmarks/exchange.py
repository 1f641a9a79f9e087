#!/usr/bin/env python3
"""What DLS adds to a step where the network is no bottleneck, beside Horovod's dense allreduce.

    python -m benchmarks.exchange --json build/exchange.json --picture build/exchange.png

Two ranks on this machine, over loopback, with the parameters of a ResNet-50. "Added" is the time of
a step less that of the same step without any exchange: all that compressing, exchanging and
decompressing costs, as far as it does not overlap. All methods take turns in one job; ratios are
those of medians in a round, with the smallest and the largest of all rounds behind. "Processor" is
what all threads of one rank used in a step, which other work on the machine hardly lengthens.

The second table tells where the time of a step with DLS goes, on rank 0.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.reporting import markdown
from benchmarks.common.shapes import MODELS
from benchmarks.hosts.jobs import JobError, launcher, middle, ratio, run_job, steps_of, title_of

REFERENCE = ["nothing", "dense", "fp16"]
METHODS = ["layerwise:0.01", "dls:0.01", "dls:0.01:bfloat16", "dls:0.001"]


def rows_of(job: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    idle = np.median(steps_of(job, "nothing"))
    for method, figures in job["methods"].items():
        seconds = steps_of(job, method)
        row = {
            "method": method,
            "step": middle(seconds),
            "added": [s - idle for s in middle(seconds)],
            "processor": float(np.median(steps_of(job, method, "cpu_seconds"))),
            "handed_over": figures["handed_over"],
            "unchanged_lengths": figures["unchanged_lengths"],
        }
        if method != "nothing":
            row["dense_over_this"] = ratio(job, method, without="nothing")
            row["fp16_over_this"] = ratio(job, method, "fp16", without="nothing")
        rows.append(row)
    return rows


def show(job: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    print(
        f"\n{job['model']}: {job['entries']:,} entries in {job['tensors']} tensors, "
        f"{job['ranks']} ranks, loopback\n"
    )
    lines = []
    for row in rows:
        sent = row["handed_over"]["allgather"] + row["handed_over"]["allreduce"]
        same = row["unchanged_lengths"]
        lines.append(
            [
                title_of(row["method"]),
                spread(row["step"], 1e3),
                f"{1e3 * row['added'][1]:.1f}",
                f"{1e3 * row['processor']:.1f}",
                f"{sent / 1e3:,.0f}",
                spread(row.get("dense_over_this")),
                spread(row.get("fp16_over_this")),
                "-" if same is None else f"{same:.0%}",
            ]
        )
    head = ["", "step, ms (quartiles)", "added, ms", "processor, ms", "kB handed over"]
    print(markdown([*head, "dense / this", "fp16 / this", "lengths unchanged"], lines))
    for row in rows:
        if parts := job["methods"][row["method"]]["profile_ms"]:
            print(f"Where a step with {title_of(row['method'])} goes, rank 0, ms\n")
            cells = [[part, f"{wall:.2f}", f"{cpu:.2f}"] for part, (wall, cpu) in parts.items()]
            print(markdown(["part", "clock", "processor"], cells))


def spread(values: list[float] | None, factor: float = 1.0) -> str:
    if values is None:
        return "-"
    low, median, high = (factor * value for value in values)
    return f"{median:.{2 if median < 10 else 1}f} ({low:.2f}–{high:.2f})"


def draw(job: dict[str, Any], rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.5))
    names = [title_of(row["method"]) for row in rows]
    medians = 1e3 * np.array([row["step"][1] for row in rows])
    low, high = (1e3 * np.array([row["step"][i] for row in rows]) for i in (0, 2))
    left.barh(names, medians, xerr=[medians - low, high - medians], color="tab:blue")
    left.set(xlabel="step, ms (median, quartiles)", title="step")
    left.invert_yaxis()
    profiles = {
        title_of(name): figures["profile_ms"]
        for name, figures in job["methods"].items()
        if figures["profile_ms"] and ":" in name
    }
    if profiles:
        parts = [p for p in next(iter(profiles.values())) if not p.startswith("whole")]
        start = np.zeros(len(profiles))
        for number, part in enumerate(parts):
            wall = np.array([profile.get(part, [0.0])[0] for profile in profiles.values()])
            color = plt.get_cmap("tab20")(number)
            right.barh(list(profiles), wall, left=start, label=part, color=color)
            start += wall
        right.set(xlabel="ms on rank 0, by the clock", title="where the time goes")
        right.invert_yaxis()
        figure.legend(loc="lower center", ncols=6, fontsize=8)
    figure.suptitle(f"{job['model']}, {job['ranks']} ranks, loopback")
    figure.tight_layout(rect=(0, 0.1, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="resnet50")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--methods", nargs="*", default=METHODS, help="as in dls:0.01:bfloat16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--turn-seconds", type=float, default=1.0)
    parser.add_argument("--warmup", type=int, default=20)
    parser.add_argument("--profile-steps", type=int, default=10)
    parser.add_argument("--bucket-bytes", type=int)
    parser.add_argument("--cycle-time", type=float, help="HOROVOD_CYCLE_TIME, ms (Horovod's: 1)")
    parser.add_argument("--tail", default="normal", help="of the noise: normal, laplace, student")
    parser.add_argument("--json", type=Path, help="where to write all figures")
    parser.add_argument("--picture", type=Path, help="where to draw them (matplotlib)")
    return parser.parse_args()


def main() -> None:
    args = parse()
    options = ["--model", args.model, "--methods", *REFERENCE, *args.methods]
    for name in ("rounds", "turn_seconds", "warmup", "profile_steps", "bucket_bytes", "tail"):
        if getattr(args, name) is not None:
            options += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    settings = {} if args.cycle_time is None else {"HOROVOD_CYCLE_TIME": str(args.cycle_time)}
    try:
        job = run_job(launcher(args.ranks), options, settings=settings, title="loopback")
    except JobError as problem:
        sys.exit(f"exchange: {problem}")
    rows = rows_of(job)
    show(job, rows)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        job |= {"kind": "exchange", "rows": rows, "rate": None, "density": None}
        args.json.write_text(json.dumps(job, indent=1))
    if args.picture:
        draw(job, rows, args.picture)


if __name__ == "__main__":
    main()
