"""Time of a step over slow links, for dense, fp16, layer-wise top-k and DLS.

    python -m benchmarks.network --json build/network.json --picture build/network.png
    python -m benchmarks.network --hosts 2 --model resnet50
    python -m benchmarks.network --hosts 4 --per-host 4 --density 0.01

With one rank on each host it also compares exchange="sparse_allreduce"; with several, DLS as it is
with hierarchical=True, by itself and with exchange="sparse_allreduce" between the hosts. Beside
Horovod's own methods stand those of torch's DistributedDataParallel over Gloo, which exchanges
dense gradients faster than Horovod does: dense, fp16, and PowerSGD.

Makes hosts out of this machine, with links of the given rate in each direction (benchmarks.hosts;
needs root), and runs one job for each number of hosts and each rate. In a job,
all methods take turns with the same gradients, for several rounds; times are medians of all steps
with quartiles behind, ratios those of medians in a round with the smallest and the largest behind.
A step has no computation in it (see benchmarks.rounds): the ratio is that of exchanging gradients,
and the most that a whole training step can win.

Bytes are those that a host's interface sent in a step, as the kernel counted them, beside what the
telemetry says: payloads times (P - 1), for a ring allgather, and what goes to allreduce times
2 (P - 1) / P; with hierarchical=True, a host's payloads times (hosts - 1); where owners add up,
what the busiest host receives, and so the difference is of that. The difference is of what is left
when that of a step with nothing to exchange (our barrier) is subtracted: headers
(4.6 %; less on fast links, where the kernel joins packets and counts one header),
acknowledgements, and Horovod's coordination, which goes on every millisecond, so that slow steps
have more of it.

All hosts share this machine's processors. With more hosts than cores, every operation waits for
its turn on each of them, so that even the smallest takes tens of milliseconds, and passes over
gradients take several times as long: real hosts are faster there. Where that is most of a step, so
with sparse exchange, ratios are smaller here than they would be.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.command_line import add_output_options, make_parser
from benchmarks.common.reporting import markdown, pyplot, save_picture, write_json
from benchmarks.hosts import INTERFACE, Hosts, HostsError, bits_per_second
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

# What DLS is designed for, at least: time of dense over time of DLS, on two hosts with a ResNet-50,
# by rate and density.
TARGETS = {
    ("1gbit", 0.01): 10,
    ("100mbit", 0.01): 35,
    ("1gbit", 0.001): 15,
    ("100mbit", 0.001): 100,
}


def methods_of(args: argparse.Namespace) -> list[str]:
    """Returns the methods to compare, as ``Method.parse`` takes them."""
    if args.methods:
        return ["nothing", "dense", *(m for m in args.methods if m not in ("nothing", "dense"))]
    methods = ["nothing", "dense", "fp16", *args.peers]
    for density in args.density:
        if args.per_host > 1:
            methods += [
                f"{kind}:{density:g}"
                for kind in ("dls", "hierarchical", "hierarchical_sparse_allreduce")
            ]
            continue
        methods += [f"{kind}:{density:g}" for kind in ("layerwise", "dls")]
        methods.append(f"dls:{density:g}:{args.values}")
        methods.append(f"sparse_allreduce:{density:g}")
    return methods


def run_all(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs a job for each number of hosts, rate and cycle time, and shows it."""
    jobs = []
    for count in args.hosts:
        for rate in args.rates:
            for cycle in args.cycle_times:
                jobs.append(measure(args, count, rate, cycle))
                show(jobs[-1])
    return jobs


def measure(args: argparse.Namespace, count: int, rate: str, cycle: float | None) -> dict[str, Any]:
    """Runs a job on new hosts; returns its figures.

    Args:
        args: the command line.
        count: number of hosts.
        rate: of their links.
        cycle: HOROVOD_CYCLE_TIME in milliseconds; None: Horovod's default.
    """
    options = [*options_of(args), "--methods", *methods_of(args), "--interface", INTERFACE]
    environment = {"HOROVOD_DYNAMIC_PROCESS_SETS": "1"} if args.per_host > 1 else {}
    environment |= {} if cycle is None else {"HOROVOD_CYCLE_TIME": f"{cycle:g}"}
    title = f"{hosts_of(count, args.per_host)}, {rate}" + (f", cycle {cycle:g} ms" if cycle else "")
    # Hosts of its own for each job: whatever goes wrong in one, the next starts clean.
    with Hosts(count, rate) as hosts:
        placed = hosts.horovodrun_options([args.per_host] * count)
        command = launcher(count * args.per_host, *placed)
        job = run_job(command, "benchmarks.rounds", options, hosts[0].popen, environment, title)
    job |= {"kind": "network", "rate": rate, "bits_per_second": bits_per_second(rate)}
    job |= {"cycle_time": cycle, "title": title}
    job["rows"] = [row_of(job, method) for method in job["methods"]]
    return job


def hosts_of(count: int, per_host: int) -> str:
    """Says how many hosts there are, and how many ranks on each."""
    return f"{count} hosts" + (f" of {per_host} ranks" if per_host > 1 else "")


def row_of(job: dict[str, Any], method: str) -> dict[str, Any]:
    """Computes the figures of a method."""
    figures = job["methods"][method]
    counted = float(np.median(steps_of(job, method, "sent_bytes")))
    busiest = float(np.median(steps_of(job, method, "most_received_bytes")))
    claimed = figures["claimed_wire_bytes"]
    # Where owners add up, that is of the busiest host.
    what = "most_received_bytes" if "sparse_allreduce" in method else "sent_bytes"
    theirs, ours = (float(np.median(steps_of(job, m, what))) for m in (method, "nothing"))
    row = {
        "method": method,
        "step": quartiles(steps_of(job, method)),
        "processor": float(np.median(steps_of(job, method, "cpu_seconds"))),
        "counted_bytes": counted,
        "busiest_bytes": busiest,
        "claimed_bytes": claimed,
        "difference": (theirs - ours) / claimed - 1 if claimed else None,
        "unchanged_lengths": figures["unchanged_lengths"],
    }
    if method != "nothing":
        row["dense_over_this"] = ratio(job, method)
        if "fp16" in job["methods"]:
            row["fp16_over_this"] = ratio(job, method, "fp16")
        if "ddp" in job["methods"]:
            row["ddp_over_this"] = ratio(job, method, "ddp")
    return row


def show(job: dict[str, Any]) -> None:
    """Prints a job's tables."""
    print(
        f"\n{job['title']}: {job['model']}, {job['entries']:,} entries in {job['tensors']} "
        "tensors\n"
    )
    lines = []
    for row in job["rows"]:
        difference, same = row["difference"], row["unchanged_lengths"]
        lines.append(
            [
                title_of(row["method"]),
                format_range(row["step"], 1e3),
                format_range(row.get("dense_over_this")),
                format_range(row.get("fp16_over_this")),
                format_range(row.get("ddp_over_this")),
                f"{row['counted_bytes'] / 1e3:,.0f}",
                f"{row['busiest_bytes'] / 1e3:,.0f}",
                f"{row['claimed_bytes'] / 1e3:,.0f}",
                "-" if difference is None else f"{difference:+.1%}",
                f"{1e3 * row['processor']:.0f}",
                "-" if same is None else f"{same:.0%}",
            ]
        )
    head = ["", "step, ms", "dense / this", "fp16 / this", "torch DDP / this", "kB sent, kernel"]
    head += ["received, busiest", "telemetry", "difference", "processor, ms", "lengths unchanged"]
    print(markdown(head, lines))
    cores = os.cpu_count() or 1
    if job["ranks"] > cores:
        print(f"{job['ranks']} ranks share {cores} cores: small operations are slow, see above.")
    for method in job["methods"]:
        if job["methods"][method]["spread"] is None:  # none of ours
            continue
        if table := format_profile(job, method):
            print(f"\n{table}")
    sys.stdout.flush()


def show_targets(jobs: list[dict[str, Any]]) -> None:
    """Prints which TARGETS were met."""
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
    """Draws each method's step, a panel for each job."""
    size = (6 * len(jobs) + 2, 0.45 * len(jobs[0]["rows"]) + 1.5)
    figure, axes = pyplot().subplots(1, len(jobs), figsize=size, sharey=True, squeeze=False)
    for axis, job in zip(axes[0], jobs, strict=True):
        rows = [row for row in job["rows"] if row["method"] != "nothing"]
        low, median, high = 1e3 * np.array([row["step"] for row in rows]).T
        names = [title_of(row["method"]) for row in rows]
        axis.errorbar(median, names, xerr=[median - low, high - median], fmt="o", capsize=3)
        axis.grid(alpha=0.3)
        for y, (x, row) in enumerate(zip(high, rows, strict=True)):
            axis.text(1.2 * x, y, f"{row['dense_over_this'][1]:.1f}×", va="center")
        axis.set(xscale="log", xlabel="step, ms", title=job["title"])
        axis.set_xlim(right=4 * high.max())
    axes[0][0].invert_yaxis()
    figure.suptitle(f"{jobs[0]['model']}: step, and how many times as long dense takes")
    figure.tight_layout()
    save_picture(figure, path)


def parse() -> argparse.Namespace:
    """Parses the command line."""
    parser = make_parser("network", __doc__)
    add_options(parser, model="mlp10m", rounds=5)
    parser.add_argument("--hosts", type=int, nargs="+", default=[4], help="numbers of hosts")
    parser.add_argument("--per-host", type=int, default=1, help="ranks on each host")
    parser.add_argument("--rates", nargs="+", default=["1gbit", "100mbit"], help="as in 1gbit")
    parser.add_argument("--density", type=float, nargs="+", default=[0.01, 0.001])
    parser.add_argument(
        "--peers",
        nargs="*",
        default=["ddp", "ddp-fp16", "powersgd:1", "powersgd:4"],
        help="methods of torch's DistributedDataParallel",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        help="what to compare with dense, as in dls:0.001:bfloat16, instead of all of these",
    )
    parser.add_argument("--values", default="bfloat16", help="the 16-bit type that is tried")
    parser.add_argument(
        "--cycle-times",
        type=float,
        nargs="+",
        default=[None],
        help="HOROVOD_CYCLE_TIME, ms, one job for each (default: Horovod's, 1)",
    )
    add_output_options(parser)
    return parser.parse_args()


def main() -> None:
    """Runs all jobs and shows their figures."""
    args = parse()
    try:
        jobs = run_all(args)
    except (HostsError, JobError, ValueError) as problem:
        sys.exit(f"network: {problem}")
    show_targets(jobs)
    if args.json:
        write_json({"jobs": jobs}, args.json)
    if args.picture:
        draw(jobs, args.picture)


if __name__ == "__main__":
    main()
