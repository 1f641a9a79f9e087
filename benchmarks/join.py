"""What ``hvd_dls.torch.join`` costs a step in which every rank has data.

    python -m benchmarks.join --json build/join.json

Two ranks on this machine, over loopback, exchange gradients that cost nothing, so a step is as
short as it can be, and the cost's share at its largest.  Turns of steps within a ``with`` block and
without one alternate, in one job and with the same model.  The cost is the difference of a round's
two medians, and its spread that over the rounds.  Coming into the block and leaving it is measured
by itself.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from pathlib import Path
from typing import Any

import horovod.torch as hvd
import numpy as np

from benchmarks.common.command_line import make_parser
from benchmarks.common.reporting import markdown, write_json
from benchmarks.common.shapes import MODELS, entries
from benchmarks.common.synthetic_model import Gradients
from benchmarks.hosts.jobs import JobError, launcher, run_job
from benchmarks.rounds.measuring import gather, wait_for_all
from benchmarks.rounds.methods import Method, RunningMethod
from hvd_dls.torch import join

PLAIN, JOINED = "without", "within join"


def turn(running: RunningMethod, joined: bool, steps: int) -> tuple[list[float], float]:
    """Makes some steps.

    Returns:
        Seconds of each, and those of coming in and leaving.
    """
    block = join(running.optimizer) if joined else contextlib.nullcontext()
    wait_for_all()
    begun = time.perf_counter()
    block.__enter__()
    around = time.perf_counter() - begun
    taken = [running.step()[0] for _ in range(steps)]
    begun = time.perf_counter()
    block.__exit__(None, None, None)
    return taken, around + time.perf_counter() - begun


def rounds(args: argparse.Namespace) -> dict[str, Any]:
    """Runs all turns on this rank; returns each turn's median step, in seconds."""
    shapes = MODELS[args.model]()
    gradients = Gradients(shapes, seed=hvd.rank())
    running = RunningMethod(Method.parse("dls:0.01"), shapes, gradients, None)
    turn(running, True, args.warmup)
    medians: dict[str, list[float]] = {PLAIN: [], JOINED: []}
    around: list[float] = []
    for number in range(args.rounds):
        for joined in (False, True) if number % 2 else (True, False):
            name = JOINED if joined else PLAIN
            steps, extra = turn(running, joined, args.steps)
            taken = gather(steps, f"{number}.{name}")
            medians[name].append(float(np.median(taken.max(axis=0))))
            if joined:
                around.append(extra)
            if hvd.rank() == 0:
                done = sum(map(len, medians.values()))
                print(f"PROGRESS {done}/{2 * args.rounds} {name}", flush=True)
    return {
        "model": args.model,
        "entries": entries(shapes),
        "tensors": len(shapes),
        "ranks": hvd.size(),
        "medians": medians,
        "around": around,
    }


def show(jobs: list[dict[str, Any]]) -> None:
    """Prints what each model's steps take, and what the block adds."""
    lines = []
    for job in jobs:
        plain, joined = (np.array(job["medians"][name]) for name in (PLAIN, JOINED))
        added = joined - plain
        lines.append(
            [
                f"{job['model']}, {job['tensors']} tensors",
                f"{1e3 * np.median(plain):.2f}",
                _quartiles(added),
                f"{np.median(added / plain):.1%}",
                _quartiles(np.array(job["around"])),
            ]
        )
    head = ["", "step, ms", "join adds, ms a step", "of a step", "coming in and leaving, ms"]
    print(markdown(head, lines))


def _quartiles(seconds: np.ndarray) -> str:
    low, middle, high = np.quantile(1e3 * seconds, (0.25, 0.5, 0.75))
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def parse() -> argparse.Namespace:
    """Parses the command line."""
    parser = make_parser("join", __doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["resnet50", "mlp1m"])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15, help="turns of each kind")
    parser.add_argument("--steps", type=int, default=15, help="of a turn")
    parser.add_argument("--warmup", type=int, default=20, help="steps for ratios to settle")
    parser.add_argument("--json", type=Path, help="where to write all figures")
    parser.add_argument("--model", choices=MODELS, help=argparse.SUPPRESS)  # within the job
    return parser.parse_args()


def main() -> None:
    """Runs a job for each model, or is one of its ranks."""
    args = parse()
    if args.model:
        hvd.init()
        figures = rounds(args)
        if hvd.rank() == 0:
            write_json(figures, args.json)
        hvd.shutdown()
        return
    options = [f"--{name}={getattr(args, name)}" for name in ("rounds", "steps", "warmup")]
    jobs = []
    for model in args.models:
        own = [*options, "--model", model]
        try:
            jobs.append(run_job(launcher(args.ranks), "benchmarks.join", own, title=model))
        except JobError as problem:
            sys.exit(f"join: {problem}")
        if args.json:
            write_json(jobs, args.json)
    show(jobs)


if __name__ == "__main__":
    main()
