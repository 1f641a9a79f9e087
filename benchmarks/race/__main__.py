"""Time to a target loss over slow links: whole trainings, beside what a user would pick instead.

    sudo .venv/bin/python -m benchmarks.race --json build/race.json --picture build/race.png
    sudo .venv/bin/python -m benchmarks.race --task digits --rates 100mbit --seeds 0 1 2
    sudo .venv/bin/python -m benchmarks.race --task code --steps 500 --first 0.5
    python -m benchmarks.race --report build/race/*.json --times build/race.png  # runs nothing

Makes hosts out of this machine, with links of the given rate (benchmarks.hosts; needs root), and
on them trains a task of benchmarks.convergence for real: Horovod dense, fp16, layer-wise top-k and
DLS; torch's DistributedDataParallel (DDP) over Gloo, dense, with its fp16 hook and PowerSGD; and
local steps as in DiLoCo, which average changes of weights every H steps, dense ("local:H") or
sparse, by hvd_dls.torch.LocalSteps ("local-dls:H:density"). All methods take turns in
one job. Learning rate and schedule are those tuned for dense training; Transformers train with
Adam, which sparse methods have in the compressor (docs/adam.md).

*Target*: the held-out loss that dense training of the same seed has after 80 % of its steps (curves
are running medians of five points). Times are without evaluation. All hosts share this machine's
processors, so that a forward and backward pass takes longer than it would on hosts of their own,
and so does what compression computes; the rest is the exchange.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common.command_line import add_output_options, make_parser
from benchmarks.common.reporting import write_json
from benchmarks.convergence.tasks import TASKS
from benchmarks.hosts import INTERFACE, Hosts, HostsError
from benchmarks.hosts.jobs import JobError, launcher, run_job
from benchmarks.race.pictures import draw_curves, draw_times
from benchmarks.race.tables import Job, overview, table

METHODS = (
    "dense",
    "fp16",
    "ddp",
    "ddp-fp16",
    "powersgd:1",
    "powersgd:2",
    "powersgd:4",
    "local:8",
    "local:32",
    "layerwise:0.01",
    "dls:0.01",
    "dls:0.001",
)


def measure(args: argparse.Namespace, rate: str, seed: int) -> Job:
    """Runs a job on new hosts; returns its results."""
    options = ["--task", args.task, "--methods", *args.methods, "--seed", str(seed)]
    options += ["--interface", INTERFACE]
    options += ["--steps", str(args.steps)] if args.steps else []
    options += ["--first", str(args.first)] if args.first is not None else []
    title = f"{args.task}, {args.hosts} hosts, {rate}, seed {seed}"
    with Hosts(args.hosts, rate) as hosts:
        placed = hosts.horovodrun_options([1] * args.hosts)
        command = launcher(args.hosts, *placed)
        job = run_job(command, "benchmarks.race.rank", options, hosts[0].popen, {}, title)
    return job | {"kind": "race", "rate": rate, "seed": seed}


def races(args: argparse.Namespace) -> list[Job]:
    """Runs all jobs, one after the other, and prints the table of each rate."""
    jobs: list[Job] = []
    for rate in args.rates:
        own = [measure(args, rate, seed) for seed in args.seeds]
        print(f"\n{args.task}, {args.hosts} hosts, {rate}\n\n{table(own)}", flush=True)
        jobs += own
    return jobs


def report(jobs: Sequence[Job]) -> None:
    """Prints how all rates compare, task by task, and where ranks have not agreed."""
    for task in dict.fromkeys(job["task"] for job in jobs):
        print("\n" + overview([job for job in jobs if job["task"] == task]))
    for job in jobs:
        different = [name for name, alike in job["alike"].items() if not alike]
        if different:
            about = f"{job['task']}, {job['rate']}, seed {job['seed']}"
            print(f"RANKS DIFFER, {about}: {', '.join(different)}")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = make_parser("race", __doc__)
    parser.add_argument("--task", choices=TASKS, default="images")
    parser.add_argument("--hosts", type=int, default=4)
    parser.add_argument("--rates", nargs="+", default=["100mbit", "1gbit", "10gbit"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, help="of each training (default: the task's)")
    parser.add_argument("--first", type=float, help="β₁ of dense training with Adam (default: 0.9)")
    parser.add_argument("--report", type=Path, nargs="+", help="files of --json: runs nothing")
    parser.add_argument("--times", type=Path, help="where to draw times to the target by rate")
    add_output_options(parser)
    args = parser.parse_args(arguments)
    if "dense" not in args.methods:
        args.methods = ["dense", *args.methods]
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs all jobs and prints the tables; returns the exit status."""
    args = parse(arguments)
    if args.report:
        jobs = [job for file in args.report for job in json.loads(file.read_text())]
    else:
        try:
            jobs = races(args)
        except (HostsError, JobError) as error:
            print(error, file=sys.stderr)
            return 1
    report(jobs)
    if args.json:
        write_json(jobs, args.json, indent=None)
    if args.picture:
        draw_curves(jobs, args.picture)
    if args.times:
        draw_times(jobs, args.times)
    return 0


if __name__ == "__main__":
    sys.exit(main())
