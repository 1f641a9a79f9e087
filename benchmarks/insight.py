"""What statistics and logs cost a step of training.

    python -m benchmarks.insight --json build/insight.json

Two ranks on this machine, over loopback, exchange gradients that cost nothing, so a step is as
short as it can be, and the cost's share at its largest.  It is far below what steps differ by, so
it is multiplied: in some turns each look at the clock and each bookkeeping of a step is made many
times over; in others the steps are logged into many files at once, a line each step.  Medians of a
turn, less that of steps as they always are in the same round, divided by the multiple, tell what a
single one costs.  Files are written by threads, and what they take of the processors is in it.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import horovod.torch as hvd
import numpy as np

from benchmarks.common.command_line import make_parser
from benchmarks.common.internals import Stopwatch, Tally, clocked_modules
from benchmarks.common.reporting import markdown, write_json
from benchmarks.common.shapes import MODELS, entries
from benchmarks.common.synthetic_model import Gradients
from benchmarks.hosts.jobs import JobError, launcher, run_job
from benchmarks.rounds.measuring import gather
from benchmarks.rounds.methods import Method, RunningMethod

PLAIN, CLOCK, LOG = "as always", "clock and bookkeeping", "a line in a file"


@contextlib.contextmanager
def clock_again(times: int) -> Iterator[None]:
    """Makes each look at the clock, and the bookkeeping of each step, ``times`` more often."""
    clock = time.perf_counter

    def look() -> float:
        for _ in range(times):
            clock()
        return clock()

    def again(method: Callable[..., Any]) -> Callable[..., Any]:
        def repeated(self: Any, *args: Any) -> Any:
            spare = copy.copy(self)
            for _ in range(times):
                method(spare, *args)
            return method(self, *args)

        return repeated

    with contextlib.ExitStack() as stack:
        for module in clocked_modules():
            stack.callback(setattr, module, "perf_counter", clock)
            vars(module)["perf_counter"] = look
        for owner, name in ((Tally, "add"), (Stopwatch, "lap")):
            method = getattr(owner, name)
            stack.callback(setattr, owner, name, method)
            setattr(owner, name, again(method))
        yield


@contextlib.contextmanager
def logs(compression: Any, count: int, folder: str) -> Iterator[None]:
    """Logs each step into so many files."""
    opened = [compression.log_to(Path(folder) / f"{n}-{{rank}}.jsonl", 1) for n in range(count)]
    try:
        yield
    finally:
        for log in opened:
            log.close()


def rounds(args: argparse.Namespace) -> dict[str, Any]:
    """Runs all turns on this rank; returns each turn's median step, in seconds."""
    shapes = MODELS[args.model]()
    gradients = Gradients(shapes, seed=hvd.rank())
    running = RunningMethod(Method.parse("dls:0.01"), shapes, gradients, None)
    for _ in range(args.warmup):
        running.step()
    medians: dict[str, list[float]] = {PLAIN: [], CLOCK: [], LOG: []}
    names = list(medians)
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.rounds):
            for i in np.random.default_rng(number).permutation(len(names)):
                name = names[i]
                with contextlib.ExitStack() as turn:
                    if name == CLOCK:
                        turn.enter_context(clock_again(args.times))
                    elif name == LOG:
                        turn.enter_context(logs(running.compression, args.times, folder))
                    steps = [running.step()[0] for _ in range(args.steps)]
                taken = gather(steps, f"{number}.{name}")
                medians[name].append(float(np.median(taken.max(axis=0))))
                if hvd.rank() == 0:
                    done = sum(map(len, medians.values()))
                    print(f"PROGRESS {done}/{3 * args.rounds} {name}", flush=True)
    return {
        "model": args.model,
        "entries": entries(shapes),
        "tensors": len(shapes),
        "ranks": hvd.size(),
        "times": args.times,
        "medians": medians,
    }


def show(jobs: list[dict[str, Any]]) -> None:
    """Prints what each model's steps take, and what one of each adds."""
    lines = []
    for job in jobs:
        plain = np.array(job["medians"][PLAIN])
        title = f"{job['model']}, {job['tensors']} tensors"
        row = [title, f"{1e3 * np.median(plain):.1f}"]
        for name in (CLOCK, LOG):
            each = (np.array(job["medians"][name]) - plain) / job["times"]
            low, middle, high = np.quantile(1e6 * each, (0.25, 0.5, 0.75))
            row.append(f"{middle:.0f} ({low:.0f} to {high:.0f})")
            row.append(f"{np.median(each / plain):.2%}")
        lines.append(row)
    head = ["", "step, ms", "clock and bookkeeping, µs a step", "of a step"]
    print(markdown([*head, "a line in a file, µs", "of a step"], lines))


def parse() -> argparse.Namespace:
    """Parses the command line."""
    parser = make_parser("insight", __doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["resnet50", "mlp1m"])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7, help="turns of each kind")
    parser.add_argument("--steps", type=int, default=15, help="of a turn")
    parser.add_argument("--warmup", type=int, default=20, help="steps for ratios to settle")
    parser.add_argument("--times", type=int, default=50, help="that the cost is multiplied by")
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
    options = [f"--{name}={getattr(args, name)}" for name in ("rounds", "steps", "warmup", "times")]
    jobs = []
    for model in args.models:
        own = [*options, "--model", model]
        try:
            jobs.append(run_job(launcher(args.ranks), "benchmarks.insight", own, title=model))
        except JobError as problem:
            sys.exit(f"insight: {problem}")
    show(jobs)
    if args.json:
        write_json(jobs, args.json)


if __name__ == "__main__":
    main()
