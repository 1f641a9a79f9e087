"""The program of each rank of a race: whole trainings, all methods in turns.

All methods train the same model on the same batches. After each fiftieth of the steps it is the
next method's turn, in another order each time, so that whatever slows the machine slows all alike.
"""

from __future__ import annotations

import argparse
import zlib
from pathlib import Path
from typing import Any

import horovod.torch as hvd
import numpy as np
import torch

from benchmarks.common.command_line import make_parser
from benchmarks.common.reporting import write_json
from benchmarks.convergence.tasks import TASKS
from benchmarks.convergence.training import POINTS, data_of, machine
from benchmarks.race.trainers import Trainer, make_trainer
from benchmarks.rounds.measuring import gather
from benchmarks.rounds.methods import Method


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Makes all trainings; returns their results."""
    task, data = TASKS[args.task], data_of(args.task)
    steps = args.steps or task.steps
    for text in args.methods:  # to compile what has to be, and to fill caches
        make_trainer(Method.parse(text), task, data, args.seed, 2).train(2, None)
    about = (task, data, args.seed, steps, args.first)
    trainers = [make_trainer(Method.parse(text), *about) for text in args.methods]
    ends = np.unique(np.linspace(0, steps, min(POINTS, steps) + 1).round().astype(int)).tolist()
    for turn, end in enumerate(ends[1:]):
        for i in np.random.default_rng(turn).permutation(len(trainers)):
            if hvd.rank() == 0:
                print(f"PROGRESS {end}/{steps} {trainers[i].method.name}", flush=True)
            trainers[i].train(end, args.interface)
    return {
        "task": args.task,
        "ranks": hvd.size(),
        "hosts": hvd.cross_size(),
        "about": machine(),
        "methods": {each.method.name: each.result() for each in trainers},
        "alike": {each.method.name: _alike(each) for each in trainers},
    }


def _alike(trainer: Trainer) -> bool:
    """Whether all ranks hold the same weights, to the bit."""
    digest = float(zlib.crc32(trainer.weights().tobytes()))
    everyone = gather([digest], f"digest.{trainer.method.name}")
    return bool((everyone == digest).all())


def main() -> None:
    """Runs the job; rank 0 writes the results."""
    parser = make_parser("race.rank", __doc__)
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--methods", nargs="+", required=True, help="as in dls:0.01, powersgd:4")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="of each training (default: the task's)")
    parser.add_argument("--first", type=float, help="β₁ of dense training with Adam")
    parser.add_argument("--interface", help="whose bytes to count")
    parser.add_argument("--json", type=Path, required=True, help="where to write all figures")
    args = parser.parse_args()
    hvd.init()
    torch.set_num_threads(1)
    result = run(args)
    if hvd.rank() == 0:
        write_json(result, args.json, indent=None)
    hvd.shutdown()


if __name__ == "__main__":
    main()
