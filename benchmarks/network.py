#!/usr/bin/env python3
"""How long a step takes over a slow network: dense, fp16, layer-wise top-k and DLS.

    python -m benchmarks.network --json build/network.json --picture build/network.png
    python -m benchmarks.network --hosts 2 --model resnet50

Makes hosts out of this machine, with links of the given rate in each direction (hosts.py; needs
root), and runs one job of one rank a host for each number of hosts and each rate. In a job, all
methods take turns with the same gradients, for several rounds; times are medians of all steps with
quartiles behind, ratios those of medians in a round with the smallest and the largest behind. A
step has no computation in it (see rounds.py): the ratio is that of exchanging gradients, and the
most that a whole training step can win.

Bytes are those that a host's interface sent in a step, as the kernel counted them, beside what the
telemetry says: payloads times (P - 1), for a ring allgather, and what goes to allreduce times
2 (P - 1) / P. The difference is of what is left when that of a step with nothing to exchange (our
barrier) is subtracted: headers (4.6 %; less on fast links, where the kernel joins packets and
counts one header), acknowledgements, and Horovod's coordination, which goes on every millisecond,
so that slow steps have more of it.

All hosts share this machine's processors. With more hosts than cores, every operation waits for
its turn on each of them, so that even the smallest takes tens of milliseconds, and passes over
gradients take several times as long: real hosts are faster there. Where that is most of a step, so
with sparse exchange, ratios are smaller here than they would be.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.reporting import markdown
from benchmarks.common.shapes import MODELS
from benchmarks.exchange import spread
from benchmarks.hosts import INTERFACE, Hosts, HostsError, bits_per_second
from benchmarks.hosts.jobs import JobError, launcher, middle, ratio, run_job, steps_of, title_of

# Designed for: dense over DLS at least, on two hosts with a ResNet-50, by rate and density.
TARGETS = {
    ("1gbit", 0.01): 10,
    ("100mbit", 0.01): 35,
    ("1gbit", 0.001): 15,
    ("100mbit", 0.001): 100,
}


def methods_of(args: argparse.Namespace) -> list[str]:
    methods = ["nothing", "dense", "fp16"]
    for density in args.density:
        methods += [f"{kind}:{density:g}" for kind in ("layerwise", "dls")]
        methods.append(f"dls:{density:g}:{args.values}")
    return methods


def run_all(args: argparse.Namespace) -> list[dict[str, Any]]:
    options = ["--model", args.model, "--methods", *methods_of(args), "--interface", INTERFACE]
    for name in ("rounds", "turn_seconds", "warmup", "profile_steps", "tail", "bucket_bytes"):
        if getattr(args, name) is not None:
            options += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    jobs = []
    for count in args.hosts:
        for rate in args.rates:
            for cycle in args.cycle_times:
                settings = {} if cycle is None else {"HOROVOD_CYCLE_TIME": f"{cycle:g}"}
                title = f"{count} hosts, {rate}" + (f", cycle {cycle:g} ms" if cycle else "")
                # Hosts of its own for each job: whatever goes wrong in one, the next starts clean.
                with Hosts(count, rate) as hosts:
                    command = launcher(count, *hosts.horovodrun_options())
                    job = run_job(command, options, hosts[0].popen, settings, title)
                job |= {"kind": "network", "rate": rate, "bits_per_second": bits_per_second(rate)}
                job |= {"cycle_time": cycle}
                job["rows"] = [row_of(job, method) for method in job["methods"]]
                jobs.append(job)
                show(job)
    return jobs


def row_of(job: dict[str, Any], method: str) -> dict[str, Any]:
    figures = job["methods"][method]
    counted = float(np.median(steps_of(job, method, "sent_bytes")))
    ours = float(np.median(steps_of(job, "nothing", "sent_bytes")))
    claimed = figures["claimed_wire_bytes"]
    row = {
        "method": method,
        "step": middle(steps_of(job, method)),
        "processor": float(np.median(steps_of(job, method, "cpu_seconds"))),
        "counted_bytes": counted,
        "claimed_bytes": claimed,
        "difference": (counted - ours) / claimed - 1 if claimed else None,
        "unchanged_lengths": figures["unchanged_lengths"],
    }
    if method != "nothing":
        row["dense_over_this"] = ratio(job, method)
        row["fp16_over_this"] = ratio(job, method, "fp16")
    return row


def show(job: dict[str, Any]) -> None:
    cycle = f", HOROVOD_CYCLE_TIME={job['cycle_time']:g}" if job["cycle_time"] else ""
    print(
        f"\n{job['ranks']} hosts, {job['rate']}: {job['model']}, {job['entries']:,} entries in "
        f"{job['tensors']} tensors{cycle}\n"
    )
    lines = []
    for row in job["rows"]:
        difference, same = row["difference"], row["unchanged_lengths"]
        lines.append(
            [
                title_of(row["method"]),
                spread(row["step"], 1e3),
                spread(row.get("dense_over_this")),
                spread(row.get("fp16_over_this")),
                f"{row['counted_bytes'] / 1e3:,.0f}",
                f"{row['claimed_bytes'] / 1e3:,.0f}",
                "-" if difference is None else f"{difference:+.1%}",
                f"{1e3 * row['processor']:.0f}",
                "-" if same is None else f"{same:.0%}",
            ]
        )
    head = ["", "step, ms", "dense / this", "fp16 / this", "kB sent, kernel", "kB, telemetry"]
    print(markdown([*head, "difference", "processor, ms", "lengths unchanged"], lines))
    cores = os.cpu_count() or 1
    if job["ranks"] > cores:
        print(f"{job['ranks']} hosts share {cores} cores: small operations are slow, see above.")
    for method, figures in job["methods"].items():
        if figures["profile_ms"] and ":" in method:
            print(f"\nWhere a step with {title_of(method)} goes, rank 0, ms\n")
            parts = figures["profile_ms"].items()
            cells = [[part, f"{wall:.2f}", f"{cpu:.2f}"] for part, (wall, cpu) in parts]
            print(markdown(["part", "clock", "processor"], cells))
    sys.stdout.flush()


def show_targets(jobs: list[dict[str, Any]]) -> None:
    for job in jobs:
        if (job["model"], job["ranks"]) != ("resnet50", 2):
            continue
        for row in job["rows"]:
            kind, *rest = row["method"].split(":")
            wanted = TARGETS.get((job["rate"], float(rest[0]))) if kind == "dls" else None
            if wanted:
                reached = row["dense_over_this"][1]
                print(
                    f"{'met   ' if reached >= wanted else 'MISSED'} {job['rate']}, "
                    f"{title_of(row['method'])}: dense / this = {reached:.1f} >= {wanted}"
                )


def draw(jobs: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = (6 * len(jobs) + 2, 0.45 * len(jobs[0]["rows"]) + 1.5)
    figure, axes = plt.subplots(1, len(jobs), figsize=size, sharey=True, squeeze=False)
    for axis, job in zip(axes[0], jobs, strict=True):
        rows = [row for row in job["rows"] if row["method"] != "nothing"]
        low, median, high = 1e3 * np.array([row["step"] for row in rows]).T
        names = [title_of(row["method"]) for row in rows]
        axis.errorbar(median, names, xerr=[median - low, high - median], fmt="o", capsize=3)
        axis.grid(alpha=0.3)
        for y, (x, row) in enumerate(zip(high, rows, strict=True)):
            axis.text(1.2 * x, y, f"{row['dense_over_this'][1]:.1f}×", va="center")
        axis.set(xscale="log", xlabel="step, ms", title=f"{job['ranks']} hosts, {job['rate']}")
        axis.set_xlim(right=4 * high.max())
    axes[0][0].invert_yaxis()
    figure.suptitle(f"{jobs[0]['model']}: step, and how many times as long dense takes")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hosts", type=int, nargs="+", default=[4], help="numbers of hosts")
    parser.add_argument("--rates", nargs="+", default=["1gbit", "100mbit"], help="as in 1gbit")
    parser.add_argument("--model", choices=MODELS, default="mlp10m")
    parser.add_argument("--density", type=float, nargs="+", default=[0.01, 0.001])
    parser.add_argument("--values", default="bfloat16", help="the 16-bit type that is tried")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--turn-seconds", type=float, default=1.0, help="for a method in a round")
    parser.add_argument("--warmup", type=int, default=20, help="steps for ratios to settle")
    parser.add_argument("--profile-steps", type=int, help="further steps, to see inside")
    parser.add_argument("--tail", default="normal", help="of the noise: normal, laplace, student")
    parser.add_argument("--bucket-bytes", type=int)
    parser.add_argument(
        "--cycle-times",
        type=float,
        nargs="+",
        default=[None],
        help="HOROVOD_CYCLE_TIME, ms, one job for each (default: Horovod's, 1)",
    )
    parser.add_argument("--json", type=Path, help="where to write all figures")
    parser.add_argument("--picture", type=Path, help="where to draw them (matplotlib)")
    return parser.parse_args()


def main() -> None:
    args = parse()
    try:
        jobs = run_all(args)
    except (HostsError, JobError, ValueError) as problem:
        sys.exit(f"network: {problem}")
    show_targets(jobs)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"jobs": jobs}, indent=1))
    if args.picture:
        draw(jobs, args.picture)


if __name__ == "__main__":
    main()
