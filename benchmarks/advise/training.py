"""A plain training with each candidate in turn: the program of each rank.

What ``hvd-dls advise`` predicts, measured without any of its code: each candidate has a model and
Horovod's optimizer of its own, and trains for some seconds before the next one has its turn.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import horovod.torch as hvd
import numpy as np
import torch

from benchmarks.advise.models import MODELS, Made
from benchmarks.common.command_line import make_parser
from benchmarks.common.reporting import write_json
from hvd_dls.torch import DLSCompressor

WARMUP = 25  # steps of DLS before any is timed


class Training:
    """A model that trains with one candidate.

    Args:
        made: model, step and optimizer.
        method: "dense", "fp16", "dls:0.01" or "dls:0.01:bfloat16".
    """

    def __init__(self, made: Made, method: str) -> None:
        kind, *rest = method.split(":")
        compression: Any = getattr(hvd.Compression, "fp16" if kind == "fp16" else "none")
        if kind == "dls":
            values = rest[1] if len(rest) > 1 else "float32"
            compression = DLSCompressor(density=float(rest[0]), values=values)
        self._model, self._step = made.model, made.step
        self._optimizer = hvd.DistributedOptimizer(
            made.optimizer(made.model.parameters()),
            named_parameters=made.model.named_parameters(),
            compression=compression,
        )
        self.warmup = WARMUP if kind == "dls" else 2

    def train(self, steps: int) -> float:
        """Makes steps; returns the seconds that one took."""
        gather(0.0)  # all ranks begin together
        start = time.perf_counter()
        for _ in range(steps):
            self._optimizer.zero_grad()
            self._step(self._model).backward()
            self._optimizer.step()
        return gather((time.perf_counter() - start) / steps)


def gather(seconds: float) -> float:
    """Returns the longest of all ranks' times."""
    everyone = hvd.allgather(torch.tensor([seconds], dtype=torch.float64), name="seconds")
    return float(everyone.max())


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Trains; returns the seconds of a step in each turn, by method."""
    made = MODELS[args.model]
    trainings = {method: Training(made(), method) for method in args.methods}
    steps = {}
    for method, training in trainings.items():
        training.train(training.warmup)
        steps[method] = int(np.clip(round(args.turn_seconds / training.train(2)), 2, 500))
    turns: dict[str, list[float]] = {method: [] for method in trainings}
    for number in range(args.rounds):
        for i in np.random.default_rng((number, args.seed)).permutation(len(trainings)):
            method = args.methods[i]
            if hvd.rank() == 0:
                done, total = sum(map(len, turns.values())), args.rounds * len(trainings)
                print(f"PROGRESS {done}/{total} {method}", flush=True)
            turns[method].append(trainings[method].train(steps[method]))
    return {"turns": turns, "steps": steps}


def main() -> None:
    """Runs the job; rank 0 writes the figures."""
    parser = make_parser("advise.training", __doc__)
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--methods", nargs="+", required=True, help="as in dls:0.01:bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--turn-seconds", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0, help="of the order in each round")
    parser.add_argument("--json", type=Path, required=True, help="where to write all figures")
    args = parser.parse_args()
    hvd.init()
    result = run(args)
    if hvd.rank() == 0:
        write_json(result, args.json)
    hvd.shutdown()


if __name__ == "__main__":
    main()
