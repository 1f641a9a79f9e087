"""Time that compression adds to a step where the network is no bottleneck.

    python -m benchmarks.exchange --json build/exchange.json --picture build/exchange.png
    python -m benchmarks.exchange --framework tensorflow

Two ranks on this machine, over loopback, with the parameters of a ResNet-50, beside Horovod's dense
allreduce. "Added" is the time of a step less that of the same step without any exchange: all that
compressing, exchanging and decompressing costs, as far as it does not overlap. All methods take
turns in one job; ratios are those of medians in a round, with the smallest and the largest of all
rounds behind. "Processor" is what all threads of one rank used in a step, and "own thread" what the
one used that trains, of which Horovod's have no part; other work on the machine hardly lengthens
them. With ``--model resnet50-small`` entries are so few that what DLS adds to dense in its own
thread is what 161 layers cost in Python.

The second table tells where the time of a step with DLS goes, on rank 0; with torch only. With
TensorFlow a step is one of a tape in a tf.function.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.command_line import add_output_options, make_parser
from benchmarks.common.reporting import markdown, pyplot, save_picture, write_json
from benchmarks.hosts.jobs import JobError, launcher, run_job
from benchmarks.rounds.options import add_options, options_of
from benchmarks.rounds.summary import (
    format_profile,
    format_range,
    quartiles,
    ratio,
    steps_of,
    title_of,
)

REFERENCE = ["nothing", "dense", "fp16"]
PROGRAMS = {"torch": "benchmarks.rounds", "tensorflow": "benchmarks.rounds.tensorflow"}
METHODS = ["layerwise:0.01", "dls:0.01", "dls:0.01:bfloat16", "dls:0.001"]


def rows_of(job: dict[str, Any]) -> list[dict[str, Any]]:
    """Computes the figures of each method."""
    rows = []
    idle = np.median(steps_of(job, "nothing"))
    for method, figures in job["methods"].items():
        step = quartiles(steps_of(job, method))
        row = {
            "method": method,
            "step": step,
            "added": [seconds - idle for seconds in step],
            "own_thread": quartiles(steps_of(job, method, "thread_seconds")),
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
    """Prints all tables."""
    print(
        f"\n{job['model']}: {job['entries']:,} entries in {job['tensors']} tensors, "
        f"{job['ranks']} ranks, loopback, {job.get('framework', 'torch')}\n"
    )
    lines = []
    for row in rows:
        sent = row["handed_over"]["allgather"] + row["handed_over"]["allreduce"]
        same = row["unchanged_lengths"]
        lines.append(
            [
                title_of(row["method"]),
                format_range(row["step"], 1e3),
                f"{1e3 * row['added'][1]:.1f}",
                format_range(row["own_thread"], 1e3),
                f"{1e3 * row['processor']:.1f}",
                f"{sent / 1e3:,.0f}",
                format_range(row.get("dense_over_this")),
                format_range(row.get("fp16_over_this")),
                "-" if same is None else f"{same:.0%}",
            ]
        )
    head = ["", "step, ms (quartiles)", "added, ms", "own thread, ms", "processor, ms"]
    print(
        markdown(
            [*head, "kB handed over", "dense / this", "fp16 / this", "lengths unchanged"], lines
        )
    )
    for row in rows:
        if table := format_profile(job, row["method"]):
            print(table)


def draw(job: dict[str, Any], rows: list[dict[str, Any]], path: Path) -> None:
    """Draws each method's step, and the parts of a step where they were measured."""
    plt = pyplot()
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
    save_picture(figure, path)


def parse() -> argparse.Namespace:
    """Parses the command line."""
    parser = make_parser("exchange", __doc__)
    add_options(parser, model="resnet50", rounds=7, profile_steps=10)
    parser.add_argument("--framework", choices=PROGRAMS, default="torch")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--methods", nargs="*", default=METHODS, help="as in dls:0.01:bfloat16")
    parser.add_argument("--cycle-time", type=float, help="HOROVOD_CYCLE_TIME, ms (Horovod's: 1)")
    add_output_options(parser)
    return parser.parse_args()


def main() -> None:
    """Runs the job and shows its figures."""
    args = parse()
    options = [*options_of(args), "--methods", *REFERENCE, *args.methods]
    cycle = {} if args.cycle_time is None else {"HOROVOD_CYCLE_TIME": str(args.cycle_time)}
    try:
        job = run_job(
            launcher(args.ranks),
            PROGRAMS[args.framework],
            options,
            environment=cycle,
            title=f"loopback, {args.framework}",
        )
    except JobError as problem:
        sys.exit(f"exchange: {problem}")
    job["framework"] = args.framework
    rows = rows_of(job)
    show(job, rows)
    if args.json:
        figures = job | {"kind": "exchange", "rows": rows, "rate": None, "density": None}
        write_json(figures, args.json)
    if args.picture:
        draw(job, rows, args.picture)


if __name__ == "__main__":
    main()
