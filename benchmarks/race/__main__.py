"""Time to a target loss over slow links: whole trainings, beside what a user would pick instead.

    sudo .venv/bin/python -m benchmarks.race --json build/race.json --picture build/race.png
    sudo .venv/bin/python -m benchmarks.race --task digits --rates 100mbit --seeds 0 1 2

Makes hosts out of this machine, with links of the given rate (benchmarks.hosts; needs root), and
on them trains a task of benchmarks.convergence for real: Horovod dense, fp16, layer-wise top-k and
DLS, and torch's DistributedDataParallel (DDP) over Gloo, dense, with its fp16 hook and PowerSGD.
All methods take turns in one job. Learning rate and schedule are those tuned for dense training.

*Target*: the held-out loss that dense training of the same seed has after 80 % of its steps (curves
are running medians of five points). Times are without evaluation. All hosts share this machine's
processors, so that a forward and backward pass takes longer than it would on hosts of their own,
and so does what compression computes; the rest is the exchange.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.command_line import add_output_options, make_parser
from benchmarks.common.reporting import markdown, pyplot, save_picture, write_json
from benchmarks.convergence.tasks import TASKS
from benchmarks.convergence.times import TARGET_AT, held_out, loss_at, steps_to
from benchmarks.hosts import INTERFACE, Hosts, HostsError
from benchmarks.hosts.jobs import JobError, launcher, run_job
from benchmarks.rounds.summary import title_of

METHODS = (
    "dense",
    "fp16",
    "ddp",
    "ddp-fp16",
    "powersgd:1",
    "powersgd:4",
    "layerwise:0.01",
    "dls:0.01",
    "dls:0.001",
)
Job = dict[str, Any]


def measure(args: argparse.Namespace, rate: str, seed: int) -> Job:
    """Runs a job on new hosts; returns its results."""
    options = ["--task", args.task, "--methods", *args.methods, "--seed", str(seed)]
    options += ["--interface", INTERFACE]
    options += ["--steps", str(args.steps)] if args.steps else []
    title = f"{args.task}, {args.hosts} hosts, {rate}, seed {seed}"
    with Hosts(args.hosts, rate) as hosts:
        placed = hosts.horovodrun_options([1] * args.hosts)
        command = launcher(args.hosts, *placed)
        job = run_job(command, "benchmarks.race.rank", options, hosts[0].popen, {}, title)
    return job | {"kind": "race", "rate": rate, "seed": seed}


def seconds_to(result: Job, target: float) -> float:
    """Returns the seconds of training until the held-out loss is no higher than a target."""
    steps = steps_to(result, target)
    if not np.isfinite(steps):
        return float("inf")
    return float(result["curve"]["seconds"][result["curve"]["step"].index(steps)])


def table(jobs: Sequence[Job]) -> str:
    """Formats the results of one rate: medians over seeds."""
    accuracy, methods = TASKS[jobs[0]["task"]].accuracy, list(jobs[0]["methods"])
    targets = [loss_at(job["methods"]["dense"], TARGET_AT) for job in jobs]

    def times(name: str) -> np.ndarray:
        pairs = zip(jobs, targets, strict=True)
        return np.array([seconds_to(job["methods"][name], target) for job, target in pairs])

    rows = []
    for name in methods:
        own, taken = [job["methods"][name] for job in jobs], times(name)
        reached = np.isfinite(taken)
        steps = [steps_to(r, t) for r, t in zip(own, targets, strict=True)]
        row = [title_of(name)]
        step_ms = [1e3 * r["seconds"] / r["about"]["steps"] for r in own]
        row.append(f"{np.median(step_ms):.0f}")
        row.append(f"{np.median([r['sent_bytes'] for r in own]) / 1e3:,.0f}")
        metric = [100 * r["accuracy"] if accuracy else r["loss"] for r in own]
        row.append(_listed(metric, 1 if accuracy else 3))
        row.append(f"{np.median(steps):.0f}" if reached.all() else "-")
        row.append(_listed(taken, 0))
        for beside in ("dense", "ddp"):
            if beside not in methods:
                row.append("-")
                continue
            faster = times(beside)[reached] / taken[reached]
            row.append(_listed(faster, 2) if len(faster) else "-")
        rows.append(row)
    head = [jobs[0]["rate"], "step, ms", "kB sent a step, kernel"]
    head += ["accuracy, %" if accuracy else "loss, nats", "steps to target", "seconds to target"]
    return markdown([*head, "dense / this", "DDP / this"], rows)


def _listed(values: Sequence[float] | np.ndarray, digits: int) -> str:
    """One value for each seed: "12, 13, -"."""
    return ", ".join(f"{v:.{digits}f}" if np.isfinite(v) else "-" for v in values)


def draw(jobs: Sequence[Job], file: Path) -> None:
    """Draws held-out losses over time, a panel for each rate, of the first seed."""
    plt = pyplot()
    first = [job for job in jobs if job["seed"] == jobs[0]["seed"]]
    figure, axes = plt.subplots(
        1, len(first), figsize=(5.5 * len(first), 4.5), sharey=True, squeeze=False
    )
    for ax, job in zip(axes[0], first, strict=True):
        target = loss_at(job["methods"]["dense"], TARGET_AT)
        for name, result in job["methods"].items():
            ours = name.startswith("dls")
            ax.plot(
                result["curve"]["seconds"],
                held_out(result),
                label=title_of(name),
                linewidth=2.2 if ours else 1.2,
                linestyle="--" if name.startswith(("ddp", "powersgd")) else "-",
            )
        ax.axhline(target, color="black", linewidth=0.8, linestyle=":")
        ax.set(xscale="log", yscale="log", xlabel="seconds of training", title=job["rate"])
        ax.grid(alpha=0.3)
    axes[0][0].set_ylabel(f"held-out loss, {first[0]['task']}")
    axes[0][-1].legend(fontsize=7, loc="lower left")
    save_picture(figure, file)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs all jobs and prints the tables; returns the exit status."""
    parser = make_parser("race", __doc__)
    parser.add_argument("--task", choices=TASKS, default="images")
    parser.add_argument("--hosts", type=int, default=4)
    parser.add_argument("--rates", nargs="+", default=["100mbit", "1gbit"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, help="of each training (default: the task's)")
    add_output_options(parser)
    args = parser.parse_args(arguments)
    if "dense" not in args.methods:
        args.methods = ["dense", *args.methods]
    jobs: list[Job] = []
    try:
        for rate in args.rates:
            jobs += [measure(args, rate, seed) for seed in args.seeds]
            own = [job for job in jobs if job["rate"] == rate]
            print(f"\n{args.task}, {args.hosts} hosts, {rate}\n\n{table(own)}")
            for job in own:
                different = [name for name, alike in job["alike"].items() if not alike]
                if different:
                    print(f"RANKS DIFFER, seed {job['seed']}: {', '.join(different)}")
    except (HostsError, JobError) as error:
        print(error, file=sys.stderr)
        return 1
    if args.json:
        write_json(jobs, args.json, indent=None)
    if args.picture:
        draw(jobs, args.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
