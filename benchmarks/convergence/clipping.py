"""Where to clip by the global norm: before what is sent is chosen, or behind the exchange?

    python -m benchmarks.convergence.clipping --small                 # in minutes
    python -m benchmarks.convergence.clipping --small --seeds 0 1 2
    python -m benchmarks.convergence.clipping --small --outliers 1 --limit 0.1    # always clipped
    python -m benchmarks.convergence.clipping                         # at full size
    python -m benchmarks.convergence.clipping --report                # only prints the table

The Transformer of ``benchmarks.convergence.adam``, with Adam's moments as docs/adam.md has them
(dense β₁ = 0.9; sparse: 0.5, in the compressor).  In every 40th step the gradient of one of the
four workers, in turn, is ``--outliers`` times as large, as bad data would have it.

One run after the other, of one thread; each is kept in build/convergence-clipping and not made
again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from benchmarks.common.command_line import make_parser
from benchmarks.common.paths import ROOT
from benchmarks.convergence.adam import Run, Training
from benchmarks.convergence.simulation import Gradients, SimulatedJob
from benchmarks.convergence.tasks import TASKS
from hvd_dls.config import DLSConfig

KEPT = ROOT / "build" / "convergence-clipping"
VERSION = 1  # of what a run does and keeps
EVERY = 40  # steps between two outliers


class Way(NamedTuple):
    """Where gradients are clipped.

    Attributes:
        title: its name in the table.
        way: of ``benchmarks.convergence.adam``, to train.
        where: "own": each worker's gradient, by its global norm; "last": by that of the step
            before; "sum": what was exchanged; or an option of the compressor; "": nowhere.
    """

    title: str
    way: str
    where: str


WAYS = {
    "dense": Way("dense, not clipped", "dense", ""),
    "dense-sum": Way("dense, `clip_grad_norm_` of the average", "dense", "sum"),
    "dense-own": Way("dense, each worker's own, before the average", "dense", "own"),
    "no": Way("sparse, not clipped", "momentum-0.5", ""),
    "sum": Way("sparse, `clip_grad_norm_` of the sparse sums", "momentum-0.5", "sum"),
    "last": Way("sparse, by the norm of the step before", "momentum-0.5", "last"),
    "layer": Way("sparse, `clip_norm`, each layer", "momentum-0.5", "clip_norm"),
    "own": Way("sparse, each worker's own global norm, exactly", "momentum-0.5", "own"),
    "option": Way("sparse, `clip_global_norm`", "momentum-0.5", "clip_global_norm"),
}


class Clipping(NamedTuple):
    """One training.

    Attributes:
        name: of the way.
        limit: of the norm.
        outliers: factor on a gradient now and then.
        run: steps, seed, model.
    """

    name: str
    limit: float
    outliers: float
    run: Run

    @property
    def about(self) -> dict[str, Any]:
        """All that its result follows from, as JSON has it."""
        own = {"name": self.name, "limit": self.limit, "outliers": self.outliers}
        about: dict[str, Any] = {"version": VERSION, **own, "run": self.run.description()}
        return about

    def file(self, folder: Path) -> Path:
        """Returns where its result is kept."""
        run = self.run.file(folder).stem
        return folder / f"{self.name}-{self.limit:g}-{self.outliers:g}-{run}.json"

    def result(self, folder: Path) -> dict[str, Any] | None:
        """Reads its result; None if there is none, or if the run would do something else now."""
        if not self.file(folder).exists():
            return None
        result: dict[str, Any] = json.loads(self.file(folder).read_text())
        return result if result["about"] == self.about else None

    def make(self, folder: Path) -> None:
        """Trains, unless the result is there."""
        if self.result(folder) is not None:
            return
        training = Training(self.run, partial(ClippedJob, self))
        while not training.done:
            training.step()
        folder.mkdir(parents=True, exist_ok=True)
        result = {"about": self.about, "loss": training.result()["loss"]}
        self.file(folder).write_text(json.dumps(result))


class ClippedJob(SimulatedJob):
    """Workers whose gradients are clipped.

    Args:
        clipping: how.
        model: see ``SimulatedJob``.
        workers: see ``SimulatedJob``.
        config: see ``SimulatedJob``.
    """

    def __init__(
        self, clipping: Clipping, model: nn.Module, workers: int, config: DLSConfig | None = None
    ) -> None:
        self._where = WAYS[clipping.name].where
        if self._where.startswith("clip_") and config is not None:
            limit: dict[str, Any] = {self._where: clipping.limit}
            config = replace(config, **limit)
        super().__init__(model, workers, config)
        self._limit, self._outliers = clipping.limit, clipping.outliers
        self._step = 0
        self._last: list[float] = []  # each worker's norm in the step before

    def gradients(self, loss_of: Any) -> tuple[list[Gradients], float]:
        """See ``SimulatedJob``; with outliers, and clipped if each worker clips its own."""
        gradients, loss = super().gradients(loss_of)
        self._step += 1
        if self._step % EVERY == 0:
            _scale(gradients[self._step // EVERY % self.workers], self._outliers)
        norms = [global_norm(own) for own in gradients]
        if self._where in ("own", "last"):
            known = norms if self._where == "own" else self._last or norms
            for own, norm in zip(gradients, known, strict=True):
                _scale(own, self._factor(norm))
        self._last = norms
        return gradients, loss

    def reduced(self, gradients: list[Gradients]) -> Gradients:
        """See ``SimulatedJob``; clipped if that is behind the exchange."""
        reduced = super().reduced(gradients)
        if self._where == "sum":
            _scale(reduced, self._factor(global_norm(reduced)))
        return reduced

    def _factor(self, norm: float) -> float:
        return min(1.0, self._limit / norm) if norm else 1.0


def global_norm(gradients: Gradients) -> float:
    """Computes the L2 norm of all layers together."""
    return math.sqrt(sum(float(np.square(g.astype(np.float64)).sum()) for g in gradients.values()))


def _scale(gradients: Gradients, factor: float) -> None:
    for gradient in gradients.values():
        gradient *= np.float32(factor)


def table(trainings: Sequence[Clipping], folder: Path) -> str:
    """Makes the table of those of the trainings that are there."""
    lines = ["| clipped | loss |", "| --- | --- |"]
    for name in dict.fromkeys(training.name for training in trainings):
        results = [t.result(folder) for t in trainings if t.name == name]
        losses = [result["loss"] for result in results if result is not None]
        if not losses:
            continue
        if None in losses:
            lines.append(f"| {WAYS[name].title} | diverged |")
            continue
        spread = f" ± {np.std(losses, ddof=1):.3f} ({len(losses)})" if len(losses) > 1 else ""
        lines.append(f"| {WAYS[name].title} | {np.mean(losses):.3f}{spread} |")
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = make_parser("convergence.clipping", __doc__)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--limit", type=float, default=0.5, help="of the norm (default: 0.5)")
    parser.add_argument("--outliers", type=float, default=30.0, help="(default: 30; 1: none)")
    parser.add_argument("--rate", type=float, default=1.0, help="factor on the learning rate")
    parser.add_argument("--small", action="store_true", help="a smaller model, 3 %, 800 steps")
    parser.add_argument("--steps", type=int, help="(default: 2400, or 800 with --small)")
    parser.add_argument("--folder", type=Path, default=KEPT, help="where results are kept")
    parser.add_argument("--report", action="store_true", help="only print the table")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Makes the trainings that are missing and prints the table; returns the exit status."""
    args = parse(arguments)
    torch.set_num_threads(1)
    steps = args.steps or TASKS["code"].steps // (3 if args.small else 1)
    trainings = [
        Clipping(
            name,
            args.limit,
            args.outliers,
            Run(WAYS[name].way, steps, seed, args.small, rate=args.rate),
        )
        for seed, name in itertools.product(args.seeds, args.ways)
    ]
    for training in trainings if not args.report else ():
        training.make(args.folder)
        print(f"{training.name}, seed {training.run.seed}: done", file=sys.stderr, flush=True)
    print(table(trainings, args.folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
