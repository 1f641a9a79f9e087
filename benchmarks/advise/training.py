"""Trainings with each candidate in turn, and advice between them: the program of each rank.

What the advice predicts is measured without any of its code: each candidate has a model and
Horovod's optimizer of its own, and trains for some seconds before the next one has its turn; half
of the turns before the advice is asked for, half of them after it.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import horovod.torch as hvd
import numpy as np
import torch

from benchmarks.advise.models import MODELS, Made
from benchmarks.common.command_line import make_parser
from benchmarks.common.reporting import write_json
from hvd_dls.advice.candidates import Candidate, candidates
from hvd_dls.torch import DLSCompressor, advise

WARMUP = 25  # steps of DLS before any is timed


class Training:
    """A model that trains with one candidate.

    Args:
        made: model, step and optimizer.
        candidate: dense, fp16 or DLS.
    """

    def __init__(self, made: Made, candidate: Candidate) -> None:
        kind = candidate.method
        compression: Any = getattr(hvd.Compression, "fp16" if kind == "fp16" else "none")
        if kind == "dls":
            compression = DLSCompressor(**candidate.options)
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


def run(args: argparse.Namespace, model: str) -> dict[str, Any]:
    """Trains a model, asks for advice, and trains again.

    Returns:
        "trainings", before and after, each with the seconds of a step in each turn, by method;
        "advice"; and the "load" of the machine before, between and after these.
    """
    made = MODELS[model]
    wanted = candidates(args.densities, ["float32"], args.exchanges)
    methods = [candidate.name for candidate in wanted]
    trainings = {each.name: Training(made(), each) for each in wanted}
    steps = {}
    for method, training in trainings.items():
        training.train(training.warmup)
        steps[method] = int(np.clip(round(args.turn_seconds / training.train(2)), 2, 500))

    def take_turns(half: int) -> dict[str, list[float]]:
        turns: dict[str, list[float]] = {method: [] for method in methods}
        for number in range(args.rounds):
            show(f"{model}: round {number + 1} {('before', 'after')[half]} the advice")
            for i in np.random.default_rng((number, half)).permutation(len(methods)):
                turns[methods[i]].append(trainings[methods[i]].train(steps[methods[i]]))
        return turns

    load = [os.getloadavg()[0]]
    before = take_turns(0)
    load.append(os.getloadavg()[0])
    show(f"{model}: the advice")
    asked = made()
    advice = advise(
        asked.model,
        asked.step,
        optimizer=asked.optimizer,
        quiet=True,
        densities=args.densities,
        exchanges=args.exchanges,
        seconds=args.seconds,
    )
    load.append(os.getloadavg()[0])
    after = take_turns(1)
    load.append(os.getloadavg()[0])
    return {"trainings": [before, after], "advice": advice.as_dict(), "load": load}


def show(what: str) -> None:
    """Says on rank 0 what goes on."""
    if hvd.rank() == 0:
        print(f"PROGRESS 0/0 {what}", flush=True)


def main() -> None:
    """Runs the job; rank 0 writes the figures."""
    parser = make_parser("advise.training", __doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, required=True)
    parser.add_argument("--densities", type=float, nargs="+", required=True)
    parser.add_argument("--exchanges", nargs="+", required=True)
    parser.add_argument("--rounds", type=int, required=True, help="before and after the advice")
    parser.add_argument("--turn-seconds", type=float, required=True)
    parser.add_argument("--seconds", type=float, required=True, help="of the advice")
    parser.add_argument("--json", type=Path, required=True, help="where to write all figures")
    args = parser.parse_args()
    hvd.init()
    result = {model: run(args, model) for model in args.models}
    if hvd.rank() == 0:
        write_json(result, args.json)
    hvd.shutdown()


if __name__ == "__main__":
    main()
