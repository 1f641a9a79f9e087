"""Larger models: a Transformer of five million parameters, that one fine-tuned, a residual net.

    python -m benchmarks.convergence.larger --minutes 30              # goes on where it stopped
    python -m benchmarks.convergence.larger --model resnet --seeds 0 1 2
    python -m benchmarks.convergence.larger --methods dense dls dls-0.001 layerwise powersgd
    python -m benchmarks.convergence.larger --model finetuned --methods dense dls-adam-0.1
    python -m benchmarks.convergence.larger --report                  # only prints the table

Four workers, simulated as in ``benchmarks.convergence``.  The Transformer: 5.3 million parameters,
a vocabulary of 2,048 tokens, AdamW, a cosine, clipping by the global norm; sparse: with the options
of docs/adam.md.  *finetuned*: the same, trained dense, on another text, Python's reference manual.
The residual net: 1.2 million parameters, SGD with momentum.  *Bytes* are what a worker puts on the
wire in a step, mean of all steps, as in ``benchmarks.convergence.peers``.

One training after the other, of one thread, a quarter of an hour each or less.  Each is kept in
build/convergence-larger; every three minutes so is what there is of it, and the same command goes
on from there.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import pickle
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common.command_line import make_parser
from benchmarks.common.paths import ROOT
from benchmarks.common.reporting import markdown
from benchmarks.convergence.larger_ways import (
    METHODS,
    MODELS,
    description,
    optimizer_of,
    suits,
)
from benchmarks.convergence.peers import bytes_of
from benchmarks.convergence.powersgd import PowerSGDJob
from benchmarks.convergence.simulation import SimulatedJob
from benchmarks.convergence.sweep import keep, result_of
from benchmarks.convergence.tasks import Data, evaluate, rate_at
from benchmarks.convergence.training import finite, machine, worker_loss
from hvd_dls.config import DLSConfig
from hvd_dls.errors import NonFiniteGradientError

KEPT = ROOT / "build" / "convergence-larger"
POINTS = 20  # of the curve
FEW_EXAMPLES = 100  # held-out examples for each, or a few more
SAVE_EVERY = 180.0  # seconds
_data: dict[str, Data] = {}  # what was made last, by model


class Training:
    """A training that may be interrupted between two steps, and kept by ``pickle``.

    Args:
        about: its ``description``.
        base: file of the weights that it begins with; None: they follow from the seed.

    Attributes:
        about: as above.
        before: held-out loss before the first step, if it has a base.
        losses: of the steps so far, mean over workers.
        curve: steps, and the loss of some held-out examples after them.
    """

    def __init__(self, about: dict[str, Any], base: Path | None = None) -> None:
        self.about = about
        self._larger = MODELS[about["model"]]
        self._model = self._larger.task.make_model(about["seed"])
        self.before: float | None = None
        if base is not None:
            self._model.load_state_dict(torch.load(base))
            self.before = evaluate(self._model, data_of(about["model"]).validation)[0]
        self._job = self._make_job()
        self._optimizer = optimizer_of(about, self._model)
        self.losses: list[float] = []
        self.curve: dict[str, list[float]] = {"step": [], "loss": []}
        self._bytes: list[tuple[int, int]] = []
        self._seconds = 0.0

    def _make_job(self) -> SimulatedJob:
        about = self.about
        if about.get("powersgd"):
            rank, dense_steps = about["powersgd"], about["dense_steps"]
            return PowerSGDJob(self._model, about["workers"], rank, dense_steps)
        config = None
        if about["options"] is not None:
            options = {
                name: tuple(value) if isinstance(value, list) else value
                for name, value in about["options"].items()
            }
            config = DLSConfig.from_options(**options)
        return SimulatedJob(self._model, about["workers"], config)

    @property
    def done(self) -> bool:
        """Whether all steps have been made, or the last loss is not finite."""
        diverged = bool(self.losses) and not math.isfinite(self.losses[-1])
        return diverged or len(self.losses) == self.about["steps"]

    def step(self) -> None:
        """Makes a step."""
        begun, about, task = time.perf_counter(), self.about, self._larger.task
        step, steps = len(self.losses), about["steps"]
        data = data_of(about["model"])
        try:
            loss = self._job.backward(worker_loss(task, self._model, data, about, step))
        except NonFiniteGradientError:
            loss = math.nan
        self.losses.append(loss)
        if not math.isfinite(loss):
            return
        if about["clip"] is not None:
            torch.nn.utils.clip_grad_norm_(self._model.parameters(), about["clip"])
        for group in self._optimizer.param_groups:
            group["lr"] = about["rate"] / task.rate * rate_at(task, step, steps)
        self._optimizer.step()
        self._bytes.append(self._sent())
        self._seconds += time.perf_counter() - begun
        if (step + 1) * POINTS // steps > step * POINTS // steps:
            every = max(1, len(data.validation.inputs) // FEW_EXAMPLES)
            few = data.validation.part(slice(None, None, every))
            self.curve["step"].append(step + 1)
            self.curve["loss"].append(evaluate(self._model, few)[0])

    def _sent(self) -> tuple[int, int]:
        """Returns the bytes that a worker handed over in the last step: sparse and dense."""
        if not self._job.sessions:
            whole = 4 * sum(p.numel() for p in self._model.parameters())
            return 0, getattr(self._job, "sent_bytes", whole)
        record = self._job.sessions[0].last_step
        assert record is not None
        return record.sparse_bytes, record.dense_bytes

    def save_weights(self, file: Path) -> None:
        """Keeps the weights, so that another training can begin with them."""
        unfinished = file.with_suffix(f".{os.getpid()}.unfinished")
        torch.save(self._model.state_dict(), unfinished)
        os.replace(unfinished, file)

    def __str__(self) -> str:
        about, made = self.about, len(self.losses)
        name = f"{about['model']} {about['method']}, seed {about['seed']}"
        loss = f"{self.curve['loss'][-1]:.3f}" if self.curve["loss"] else "-"
        pace = self._seconds / max(1, made)
        return f"{name}: step {made} of {about['steps']}, loss {loss}, {pace:.2f} s a step"

    def result(self) -> dict[str, Any]:
        """Returns all figures, as JSON can hold them."""
        whole = len(self.losses) == self.about["steps"] and math.isfinite(self.losses[-1])
        held_out = data_of(self.about["model"]).validation
        loss, accuracy = evaluate(self._model, held_out) if whole else (None, None)
        sparse_bytes, dense_bytes = np.mean(self._bytes or [(0, 0)], axis=0).tolist()
        return {
            "about": self.about,
            "before": finite(self.before),
            "loss": finite(loss),
            "accuracy": finite(accuracy),
            "training_loss": [finite(each) for each in self.losses],
            "curve": self.curve,
            "entries": sum(p.numel() for p in self._model.parameters()),
            "sparse_bytes": sparse_bytes,
            "dense_bytes": dense_bytes,
            "seconds": self._seconds,
            "machine": machine(),
        }


def data_of(model: str) -> Data:
    """Makes the data of a model, or returns what was made last."""
    if model not in _data:
        _data.clear()
        _data[model] = MODELS[model].task.data()
    return _data[model]


def make(
    about: dict[str, Any],
    file: Path,
    until: float = math.inf,
    save_every: float = SAVE_EVERY,
    base: Path | None = None,
    weights: Path | None = None,
) -> bool:
    """Makes one training, or goes on with one that was interrupted, unless it is there.

    Args:
        about: its ``description``.
        file: of the result; it is there whole or not at all.
        until: when to interrupt it, by ``time.monotonic``.
        save_every: seconds after which what there is of it is kept.
        base: file of the weights that it begins with.
        weights: file for the weights that it ends with; None: they are not kept.

    Returns:
        Whether it is there now.
    """
    if result_of(about, file) is not None and (weights is None or weights.exists()):
        return True
    file.parent.mkdir(parents=True, exist_ok=True)
    kept = file.with_suffix(".interrupted")
    training = _interrupted(about, kept) or Training(about, base)
    saved, said = time.monotonic(), len(training.curve["step"])
    while not training.done and time.monotonic() < until:
        training.step()
        if len(training.curve["step"]) > said:
            said = len(training.curve["step"])
            print(training, file=sys.stderr, flush=True)
        if time.monotonic() > saved + save_every:
            _save(training, kept)
            saved = time.monotonic()
    if not training.done:
        _save(training, kept)
        return False
    if weights is not None:
        training.save_weights(weights)
    keep(training.result(), file)
    kept.unlink(missing_ok=True)
    return True


def _interrupted(about: dict[str, Any], kept: Path) -> Training | None:
    """Reads what there is of a training; None: nothing, or of one that would be another now."""
    if not kept.exists():
        return None
    with kept.open("rb") as stream:
        if pickle.load(stream) != about:
            return None
        training: Training = pickle.load(stream)
        return training


def _save(training: Training, kept: Path) -> None:
    unfinished = kept.with_suffix(f".{os.getpid()}.unfinished")
    with unfinished.open("wb") as stream:
        pickle.dump(training.about, stream)
        pickle.dump(training, stream)
    os.replace(unfinished, kept)


def table(model: str, results: dict[tuple[str, int], dict[str, Any]]) -> str:
    """Formats the figures of a model: mean of all seeds and its standard deviation.

    Args:
        model: one of MODELS.
        results: by method and seed.
    """
    accuracy, rows = MODELS[model].task.accuracy, []
    dense = {seed: r for (name, seed), r in results.items() if name == "dense"}
    for name, method in METHODS.items():
        own = {seed: r for (n, seed), r in results.items() if n == name}
        if not own:
            continue
        values = [r["accuracy"] if accuracy else r["loss"] for r in own.values()]
        good = np.array([100 * v if accuracy else v for v in values if v is not None])
        figure = "diverged"
        if len(good):
            figure = f"{good.mean():.1f}" if accuracy else f"{good.mean():.3f}"
            if len(good) > 1:
                spread = good.std(ddof=1)
                figure += f" ± {spread:.1f}" if accuracy else f" ± {spread:.3f}"
        pairs = [
            (own[s]["loss"], dense[s]["loss"])
            for s in own
            if s in dense and None not in (own[s]["loss"], dense[s]["loss"])
        ]
        above = 100 * np.mean([loss / beside - 1 for loss, beside in pairs]) if pairs else math.nan
        rows.append(
            [
                method.title,
                f"{np.mean([bytes_of(r) for r in own.values()]) / 1e3:,.0f}",
                figure,
                *([] if accuracy else [f"{above:+.1f} %" if pairs and name != "dense" else "-"]),
                f"{len(good)} of {len(own)}",
            ]
        )
    before = [r["before"] for r in results.values() if r.get("before") is not None]
    if before:
        rows.insert(0, ["before", "-", f"{before[0]:.3f}", "-", "-"])
    metric = ["accuracy, %"] if accuracy else ["loss, nats a token", "above dense"]
    return markdown([model, "kB a step", *metric, "seeds"], rows)


def _run(
    folder: Path, model: str, name: str, seed: int, steps: int | None = None
) -> tuple[dict[str, Any], Path]:
    """Returns what a training's result follows from, and its file."""
    about = description(model, name, seed, steps)
    return about, folder / model / f"{name}-{about['steps']}-{seed}.json"


def _make_all(folder: Path, runs: dict[tuple[str, str, int], Any], until: float) -> bool:
    """Makes the trainings that are missing, and what they begin with; returns whether all are."""
    for (model, _, _), (about, file) in runs.items():
        base, weights = MODELS[model].base, None
        if base is not None:
            weights = folder / base / "trained.weights"
            of_base, its_file = _run(folder, base, "dense", 0)
            if not make(of_base, its_file, until, weights=weights):
                return False
        if not make(about, file, until, base=weights):
            return False
    return True


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = make_parser("convergence.larger", __doc__)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=["transformer"])
    usual = ["dense", "dls"]
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=usual)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, help="of every training (default: 1,000)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="then stop; go on later")
    parser.add_argument("--folder", type=Path, default=KEPT, help="where results are kept")
    parser.add_argument("--report", action="store_true", help="only print the tables")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Makes the trainings that are missing and prints the tables; returns the exit status."""
    args = parse(arguments)
    torch.set_num_threads(1)
    until = time.monotonic() + 60 * args.minutes
    runs = {}
    names = METHODS if args.report else args.methods
    for model, seed, name in itertools.product(args.model, args.seeds, names):
        if suits(model, name):
            runs[model, name, seed] = _run(args.folder, model, name, seed, args.steps)
    if not args.report and not _make_all(args.folder, runs, until):
        print("stopped: the same command goes on", file=sys.stderr)
    results = {key: result for key, each in runs.items() if (result := result_of(*each))}
    for model in args.model:
        own = {(name, seed): r for (m, name, seed), r in results.items() if m == model}
        print(f"\n{table(model, own)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
