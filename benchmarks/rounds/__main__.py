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
from benchmarks.rounds.turns import Rounds


def profile(running: RunningMethod, steps: int) -> dict[str, Any]:
    """Measures the parts of some steps on this rank; returns milliseconds a step, by part."""
    watch = Stopwatch()
    with watch.watching():
        taken = np.array([running.step() for _ in range(steps)])
    total, _, total_cpu, *_ = taken.sum(axis=0).tolist()
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
    rounds = Rounds(running, args, gather, rank=hvd.rank())
    turns = rounds.take_turns()
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
