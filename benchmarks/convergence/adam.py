"""Ways to train sparsely with Adam, beside dense Adam, in the simulation.

    python -m benchmarks.convergence.adam                            # all ways, one seed
    python -m benchmarks.convergence.adam --ways dense scaled --seeds 0 1 2
    python -m benchmarks.convergence.adam --density 0.001            # with a longer warm-up
    python -m benchmarks.convergence.adam --rate 2                   # at twice the learning rate
    python -m benchmarks.convergence.adam --workers 16               # who share the same batch
    python -m benchmarks.convergence.adam --small                    # short trainings: to scout
    python -m benchmarks.convergence.adam --minutes 8                # goes on where it stopped
    python -m benchmarks.convergence.adam --report                   # only prints the table

One run after the other, of one thread. Each is kept in build/convergence-adam/WAY-STEPS-SEED.json
(with density and rate, if given) and not made again unless its description has changed; one that
is interrupted by --minutes is kept, too.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import pickle
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.common.command_line import make_parser
from benchmarks.common.paths import ROOT
from benchmarks.convergence.adam_ways import BETAS, WAYS, Way
from benchmarks.convergence.models import Transformer
from benchmarks.convergence.preconditioning import Preconditioner
from benchmarks.convergence.settings import DENSITIES, WARMUP
from benchmarks.convergence.simulation import Gradients, SimulatedJob
from benchmarks.convergence.tasks import TASKS, evaluate, rate_at
from benchmarks.convergence.training import data_of, worker_loss
from hvd_dls.config import DLSConfig

KEPT = ROOT / "build" / "convergence-adam"
TASK = "code"
WORKERS = 4
VERSION = 1  # of what a run does and keeps


class Run(NamedTuple):
    """One training.

    Attributes:
        way: name of it.
        steps: of the training.
        seed: of first weights and the order of examples.
        small: whether it is a Transformer of half the width with three times the density, which
            wants a third of the steps: to scout.
        density: share of entries that are sent, once the warm-up is over.
        rate: factor on the way's learning rate.
        workers: that share each batch.
    """

    way: str
    steps: int
    seed: int
    small: bool = False
    density: float = DENSITIES[0]
    rate: float = 1.0
    workers: int = WORKERS

    def file(self, folder: Path) -> Path:
        """Returns where its result is kept in a folder of results."""
        density = "" if self.density == DENSITIES[0] else f"-density-{self.density:g}"
        rate = "" if self.rate == 1 else f"-rate-{self.rate:g}"
        workers = "" if self.workers == WORKERS else f"-workers-{self.workers}"
        small = "-small" * self.small
        return folder / f"{self.way}-{self.steps}-{self.seed}{density}{rate}{workers}{small}.json"

    def description(self) -> dict[str, Any]:
        """Returns all that its result follows from, as JSON has it."""
        way = WAYS[self.way]._asdict() | {"title": None}
        moments = WAYS[self.way].moments
        way["moments"] = None if moments is None else moments._asdict()
        about = {"version": VERSION, "task": TASK, "way": way, **self._asdict()}
        if self.workers == WORKERS:
            del about["workers"]  # results of before have none
        result: dict[str, Any] = json.loads(json.dumps(about))
        return result

    def result(self, folder: Path) -> dict[str, Any] | None:
        """Reads its result; None if there is none, or if the run would do something else now."""
        if not self.file(folder).exists():
            return None
        result: dict[str, Any] = json.loads(self.file(folder).read_text())
        return result if result["about"] == self.description() else None

    def make_model(self) -> torch.nn.Module:
        """Makes the model, with weights that follow from the seed."""
        if not self.small:
            return TASKS[TASK].make_model(self.seed)
        torch.manual_seed(self.seed)
        return Transformer(width=48)

    def config(self) -> DLSConfig | None:
        """Makes the compressor's options; None: dense."""
        way = WAYS[self.way]
        if way.options is None:
            return None
        frozen = way.moments is not None and way.moments.second == "frozen"
        stairs = {"dense_steps" if frozen else "warmup_steps": self.warmup_steps}
        density = self.density * (3 if self.small else 1)
        return DLSConfig.from_options(density=density, **way.options, **stairs)

    @property
    def warmup_steps(self) -> int:
        """How many steps the warm-up takes."""
        longer = WARMUP[self.density] / WARMUP[DENSITIES[0]]
        return round(WAYS[self.way].warmup * longer * self.steps)


class Training:
    """A training that may be interrupted between two steps, and kept by ``pickle``.

    Args:
        run: to be made.
        make_job: makes the workers.

    Attributes:
        losses: of the steps so far, mean over workers.
    """

    def __init__(self, run: Run, make_job: Callable[..., SimulatedJob] = SimulatedJob) -> None:
        self._run, self._way = run, WAYS[run.way]
        self._model = run.make_model()
        self._job = make_job(self._model, run.workers, run.config())
        self._updater = Updater(self._model, self._job, self._way)
        self._preconditioner = None
        if self._way.moments is not None:
            self._preconditioner = Preconditioner(self._way.moments, run.workers, run.warmup_steps)
        self.losses: list[float] = []
        self._bytes: list[float] = []
        self._seconds = 0.0

    @property
    def done(self) -> bool:
        """Whether all steps have been made, or the last loss is not finite."""
        diverged = bool(self.losses) and not math.isfinite(self.losses[-1])
        return diverged or len(self.losses) == self._run.steps

    def step(self) -> None:
        """Makes a step."""
        begun, task, way, step = time.perf_counter(), TASKS[TASK], self._way, len(self.losses)
        about = {"seed": self._run.seed, "workers": self._run.workers}
        loss_of = worker_loss(task, self._model, data_of(TASK), about, step)
        gradients, loss = self._job.gradients(loss_of)
        self.losses.append(loss)
        if not math.isfinite(loss):
            return
        factor = self._run.rate * way.rate * task.adam_rate / task.rate
        rate = factor * rate_at(task, step, self._run.steps)
        if self._preconditioner is not None:
            self._precondition(gradients, rate if way.rate_when == "leaves" else 1.0)
        self._updater.apply(gradients, rate)
        if self._job.sessions and (record := self._job.sessions[0].last_step) is not None:
            self._bytes.append(record.sparse_bytes + record.dense_bytes)
        self._seconds += time.perf_counter() - begun

    def _precondition(self, gradients: list[Gradients], factor: float) -> None:
        assert self._preconditioner is not None
        sparse = {n for n in gradients[0] if self._job.sessions[0].may_be_sparse(n)}
        updates = self._preconditioner.updates([_part(own, sparse) for own in gradients])
        for own, update in zip(gradients, updates, strict=True):
            own |= {n: u * np.float32(factor) for n, u in update.items()}
        for session in self._job.sessions if self._way.kept < 1 else []:
            for residual in session.residuals.values():
                residual *= np.float32(self._way.kept)

    def result(self) -> dict[str, Any]:
        """Returns description, held-out loss in nats, losses of the last tenth, bytes a step."""
        whole = len(self.losses) == self._run.steps and math.isfinite(self.losses[-1])
        entries = sum(p.numel() for p in self._model.parameters())
        return {
            "about": self._run.description(),
            "loss": evaluate(self._model, data_of(TASK).validation)[0] if whole else None,
            "training_loss": float(np.mean(self.losses[-max(1, self._run.steps // 10) :])),
            "bytes": float(np.mean(self._bytes)) if self._bytes else 4.0 * entries,
            "seconds": self._seconds,
        }


def _part(gradients: Gradients, names: set[str]) -> Gradients:
    return {name: gradient for name, gradient in gradients.items() if name in names}


class Updater:
    """Exchanges what workers accumulate, and applies it to the weights.

    Updates that were made in front of the selection are subtracted as they come, as by plain SGD.
    Where the benchmark made them, and not the compressor, layers that go dense go through Adam.

    Args:
        model: that trains.
        job: its workers.
        way: to train.
    """

    def __init__(self, model: torch.nn.Module, job: SimulatedJob, way: Way) -> None:
        self._job, self._way = job, way
        self._parameters = dict(model.named_parameters())
        self._plain: set[str] = set()
        if way.options and way.options.get("adam"):
            self._plain = set(self._parameters)
        elif way.moments is not None:
            self._plain = {n for n in self._parameters if job.sessions[0].may_be_sparse(n)}
        rest = [p for n, p in self._parameters.items() if n not in self._plain]
        betas = (way.first if way.moments is None else way.moments.first, BETAS[1])
        self._adam = torch.optim.Adam(rest, betas=betas, amsgrad=way.amsgrad) if rest else None

    def apply(self, gradients: list[Gradients], rate: float) -> None:
        """Makes a step of what each worker accumulates; overwrites it."""
        way, reduced = self._way, self._job.reduced(gradients)
        for name, parameter in self._parameters.items():
            arrived = torch.from_numpy(reduced[name]).view_as(parameter)
            if name not in self._plain:
                parameter.grad = arrived
                continue
            if way.sign:
                arrived = arrived.sign()
            factor = rate if way.rate_when == "arrives" else 1.0
            parameter.data.sub_(arrived, alpha=factor)
        if self._adam is None:
            return
        # In front of the selection, the factor on the rate is for what goes through it alone.
        self._adam.param_groups[0]["lr"] = rate if way.moments is None else rate / way.rate
        self._adam.step()


def make(run: Run, folder: Path, until: float = math.inf) -> bool:
    """Makes one run, or goes on with one that was interrupted, unless it is there.

    Args:
        run: to be made.
        folder: of results; files are there whole or not at all.
        until: when to interrupt it, by ``time.monotonic``.

    Returns:
        Whether it is there now.
    """
    if run.result(folder) is not None:
        return True
    folder.mkdir(parents=True, exist_ok=True)
    kept = run.file(folder).with_suffix(".interrupted")
    training = None
    if kept.exists():
        about, training = pickle.loads(kept.read_bytes())
        training = training if about == run.description() else None
    training = training or Training(run)
    while not training.done and time.monotonic() < until:
        training.step()
    if not training.done:
        _write(kept, pickle.dumps((run.description(), training)))
        return False
    _write(run.file(folder), json.dumps(training.result()).encode())
    kept.unlink(missing_ok=True)
    return True


def _write(file: Path, content: bytes) -> None:
    unfinished = file.with_suffix(f".{os.getpid()}.unfinished")
    unfinished.write_bytes(content)
    os.replace(unfinished, file)


def table(runs: Sequence[Run], folder: Path) -> str:
    """Makes the table of those of the runs that are there."""
    lines = ["| way | loss | above dense | kB a step and rank |", "| --- | --- | --- | --- |"]
    for name in dict.fromkeys(run.way for run in runs):
        pairs = []
        for each in (run for run in runs if run.way == name):
            beside = each._replace(way="dense", density=DENSITIES[0], rate=1.0, workers=WORKERS)
            result, dense = (run.result(folder) for run in (each, beside))
            if result is not None and result["loss"] is not None:
                pairs.append((result["loss"], dense and dense["loss"], result["bytes"]))
        if not pairs:
            continue
        losses = [loss for loss, _, _ in pairs]
        spread = f" ± {np.std(losses, ddof=1):.3f} ({len(losses)})" if len(losses) > 1 else ""
        # Of the same seeds: much of the noise is common to both.
        above = [loss / dense - 1 for loss, dense, _ in pairs if dense]
        gap = f"{100 * np.mean(above):+.2f} %" if above and name != "dense" else "-"
        size = np.mean([size for _, _, size in pairs]) / 1000
        lines.append(f"| {WAYS[name].title} | {np.mean(losses):.4f}{spread} | {gap} | {size:.1f} |")
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = make_parser("convergence.adam", __doc__)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--density", type=float, choices=DENSITIES, default=DENSITIES[0])
    parser.add_argument("--rate", type=float, default=1.0, help="factor on the learning rate")
    parser.add_argument("--workers", type=int, default=WORKERS, help="that share each batch")
    parser.add_argument("--small", action="store_true", help="a smaller model, 3 %, 800 steps")
    parser.add_argument("--steps", type=int, help="(default: 2400, or 800 with --small)")
    parser.add_argument("--folder", type=Path, default=KEPT, help="where results are kept")
    parser.add_argument("--minutes", type=float, default=math.inf, help="to stop after")
    parser.add_argument("--report", action="store_true", help="only print the table")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Makes the runs that are missing and prints the table; returns the exit status."""
    args = parse(arguments)
    torch.set_num_threads(1)
    steps = args.steps or TASKS[TASK].steps // (3 if args.small else 1)
    pairs = itertools.product(args.seeds, args.ways)
    about = {"small": args.small, "density": args.density, "rate": args.rate}
    about["workers"] = args.workers
    dense = about | {"density": DENSITIES[0]}  # which it has none of
    runs = [
        Run(way, steps, seed, **(about if WAYS[way].options is not None else dense))
        for seed, way in pairs
    ]
    until = time.monotonic() + 60 * args.minutes
    for run in runs if not args.report else ():
        if not make(run, args.folder, until):
            print("stopped: the same command goes on", file=sys.stderr)
            break
        print(f"{run.way}, seed {run.seed}: done", file=sys.stderr, flush=True)
    print(table(runs, args.folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
