"""Runs several methods to exchange the same gradients in one job, in interleaved rounds.

This is the program of each rank of the benchmarks exchange and network. A step here is what is
left when gradients cost nothing: they are drawn before the clock starts, when all ranks wait for
each other. The step is autograd handing them out, layer by layer, what Horovod and the compressor
do with them, and an optimizer that does nothing. A step takes as long as on the slowest rank. All
methods use the same memory for gradients, and each round has them in another order.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import horovod.torch as hvd
import numpy as np
import torch

from benchmarks.common.command_line import make_parser
from benchmarks.common.internals import HAVE_NUMBA
from benchmarks.common.reporting import write_json
from benchmarks.common.shapes import MODELS, entries
from benchmarks.common.stopwatch import Stopwatch
from benchmarks.common.synthetic_model import Gradients
from benchmarks.rounds.ddp import DDP, RunningDDP
from benchmarks.rounds.measuring import gather
from benchmarks.rounds.methods import Method, RunningMethod
from benchmarks.rounds.options import add_options
from hvd_dls.torch import DLSCompressor

MOST_STEPS = 40  # in a turn


def warm_up(running: RunningMethod, steps: int, seconds: float) -> int:
    """Does some steps, so that ratios settle; returns how many a turn should have.

    Args:
        running: the method.
        steps: how many, if the method has ratios.
        seconds: that a turn should take.
    """
    sparse = isinstance(running.compression, DLSCompressor)
    first = running.first_steps + (seconds >= 10)
    taken = [running.step()[0] for _ in range(steps if sparse else first)]
    longest = float(gather([taken[-1]], "warm").max())
    running.forget_records()
    return int(np.clip(round(seconds / longest), 1, MOST_STEPS))


def measure_turn(
    running: RunningMethod, steps: int, interface: str | None
) -> dict[str, list[float]]:
    """Measures some steps of a method.

    Returns:
        Of each step, the slowest rank's seconds, the most bytes that a rank received, and means
        over ranks of all else.
    """
    taken = gather([running.step(interface) for _ in range(steps)], f"taken.{steps}")
    return {
        "seconds": taken[:, :, 0].max(axis=0).tolist(),
        "cpu_seconds": taken[:, :, 1].mean(axis=0).tolist(),
        "received_bytes": taken[:, :, 2].mean(axis=0).tolist(),
        "most_received_bytes": taken[:, :, 2].max(axis=0).tolist(),
        "sent_bytes": taken[:, :, 3].mean(axis=0).tolist(),
    }


def profile(running: RunningMethod, steps: int) -> dict[str, Any]:
    """Measures the parts of some steps on this rank; returns milliseconds a step, by part."""
    watch = Stopwatch()
    with watch.watching():
        taken = np.array([running.step() for _ in range(steps)])
    total, total_cpu, *_ = taken.sum(axis=0).tolist()
    parts = {
        label: [1e3 * s / steps, 1e3 * watch.cpu_seconds[label] / steps]
        for label, s in watch.longest_first()
    }
    rest = total - sum(watch.seconds.values())
    parts["rest: autograd, Horovod's hooks, Python"] = [1e3 * rest / steps, float("nan")]
    parts["whole step (processor: of all threads)"] = [1e3 * total / steps, 1e3 * total_cpu / steps]
    return parts


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Runs warm-ups, rounds and profiles of all methods; returns all figures."""
    shapes = MODELS[args.model]()
    gradients = Gradients(shapes, args.tail, args.spread, seed=hvd.rank())
    methods = [Method.parse(text) for text in args.methods]
    running = [
        (RunningDDP if method.compression in DDP else RunningMethod)(
            method, shapes, gradients, args.bucket_bytes
        )
        for method in methods
    ]
    total, done = len(running) * (args.rounds + 1) + bool(args.profile_steps), 0

    def show_progress(what: str) -> None:
        nonlocal done
        if hvd.rank() == 0:
            print(f"PROGRESS {done}/{total} {what}", flush=True)
        done += 1

    steps = []
    for each in running:
        show_progress(f"warming up {each.method.name}")
        steps.append(warm_up(each, args.warmup, args.turn_seconds))
    turns: dict[str, list[dict[str, Any]]] = {method.name: [] for method in methods}
    for number in range(args.rounds):
        for i in np.random.default_rng(number).permutation(len(running)):
            show_progress(f"round {number + 1}: {methods[i].name}")
            turns[methods[i].name].append(measure_turn(running[i], steps[i], args.interface))
    show_progress("done" if not args.profile_steps else "profile")
    profiles = {}
    for each in running if args.profile_steps else []:
        profiles[each.method.name] = profile(each, args.profile_steps)
    return {
        "model": args.model,
        "entries": entries(shapes),
        "tensors": len(shapes),
        "ranks": hvd.size(),
        "hosts": hvd.cross_size(),
        "about": {
            "numba": HAVE_NUMBA,
            "torch": torch.__version__,
            "threads": args.threads,
            "cores": os.cpu_count(),
        },
        "methods": {
            each.method.name: {
                "turns": turns[each.method.name],
                "handed_over": each.handed_over(),
                "claimed_wire_bytes": each.link_bytes(),
                "unchanged_lengths": each.unchanged_lengths(),
                "spread": each.records[-1]["spread"] if each.records else None,
                "profile_ms": profiles.get(each.method.name),
            }
            for each in running
        },
    }


def main() -> None:
    """Runs the job; rank 0 writes the figures."""
    parser = make_parser("rounds", __doc__)
    add_options(parser, model="tiny")
    parser.add_argument("--methods", nargs="+", required=True, help="as in dls:0.01:bfloat16")
    parser.add_argument("--interface", help="whose bytes to count")
    parser.add_argument("--spread", type=float, default=100.0, help="between layers' scales")
    parser.add_argument("--threads", type=int, default=1, help="of torch on each rank")
    parser.add_argument("--json", type=Path, required=True, help="where to write all figures")
    args = parser.parse_args()
    hvd.init()
    torch.set_num_threads(args.threads)
    result = run(args)
    if hvd.rank() == 0:
        write_json(result, args.json, indent=None)
    hvd.shutdown()


if __name__ == "__main__":
    main()
