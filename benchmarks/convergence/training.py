"""One run: a training from its description to all figures that are kept of it."""

from __future__ import annotations

import hashlib
import math
import os
import platform
import time
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.convergence.powersgd import PowerSGDJob
from benchmarks.convergence.simulation import SimulatedJob
from benchmarks.convergence.tasks import TASKS, Data, Task, batch, evaluate, loss, rate_at
from hvd_dls.config import DLSConfig
from hvd_dls.errors import NonFiniteGradientError

POINTS = 50  # of each curve
MEASURE_ALL = 10  # steps between two in which all workers' choices are compared
FEW_EXAMPLES = 250  # held-out examples for each point of a curve; the end takes all


class History:
    """Figures that a run collects as it goes on.

    Args:
        names: of the compressed layers.
        sizes: of these layers.

    Attributes:
        curve: losses and accuracy, POINTS times.
        layers: k and thresholds of each layer, POINTS times.
        quality: what worker 0 measured of its selection, in each step.
        shared: misallocation beside the mean of all workers' ideals, every MEASURE_ALL steps; and
            what worker 0's own would be ("least").
        bytes: sparse and dense, of each step.
        entries: sent in each step.
        gradient_seconds: of each step, the median over workers.
        losses: of each step.
    """

    def __init__(self, names: list[str], sizes: list[int]) -> None:
        self.curve: dict[str, list[float]] = {
            "step": [], "training_loss": [], "loss": [], "accuracy": []
        }  # fmt: skip
        self.layers: dict[str, list[Any]] = {
            "names": names, "sizes": sizes, "step": [], "k": [], "thresholds": []
        }  # fmt: skip
        self.quality: dict[str, list[float]] = {"step": [], "energy": [], "misallocation": []}
        self.shared: dict[str, list[float]] = {"step": [], "misallocation": [], "least": []}
        self.bytes: list[list[float]] = []
        self.entries: list[float] = []
        self.gradient_seconds: list[float] = []
        self.losses: list[float] = []

    def add_step(self, job: SimulatedJob, dense_bytes: int, training_loss: float) -> None:
        """Adds a step.

        Args:
            job: after the step.
            dense_bytes: of the whole gradient, which is what is sent without compression.
            training_loss: mean over workers.
        """
        self.losses.append(training_loss)
        self.gradient_seconds.append(float(np.median(job.gradient_seconds)))
        records = [session.last_step for session in job.sessions]
        if not records:
            self.bytes.append([0, getattr(job, "sent_bytes", dense_bytes)])
        for record in records[:1]:
            assert record is not None
            if record.quality is not None:
                self.quality["step"].append(len(self.losses))
                self.quality["energy"].append(float(record.quality.energy))
                self.quality["misallocation"].append(float(record.quality.misallocation))
            best = [r.quality.best_k for r in records if r is not None and r.quality is not None]
            if len(best) == len(records) and record.k.sum():
                # Ranks that choose for themselves send entries of their own number.
                k = np.mean([r.k for r in records if r is not None], axis=0)
                ideal, total = np.mean(best, axis=0), 2 * k.sum()
                self.shared["step"].append(len(self.losses))
                self.shared["misallocation"].append(float(np.abs(k - ideal).sum() / total))
                self.shared["least"].append(float(np.abs(best[0] - ideal).sum() / total))
            sent = [[r.sparse_bytes, r.dense_bytes] for r in records if r is not None]
            self.bytes.append(np.mean(sent, axis=0).tolist())
            self.entries.append(float(np.mean([r.k.sum() for r in records if r is not None])))

    def add_point(self, job: SimulatedJob, held_out: tuple[float, float]) -> None:
        """Adds a point of the curves.

        Args:
            job: after the last step.
            held_out: loss and accuracy.
        """
        since = int(self.curve["step"][-1]) if self.curve["step"] else 0
        values = (len(self.losses), float(np.mean(self.losses[since:])), *held_out)
        for column, value in zip(self.curve.values(), values, strict=True):
            column.append(value)
        if job.sessions and (record := job.sessions[0].last_step) is not None:
            self.layers["step"].append(len(self.losses))
            self.layers["k"].append(record.k.tolist())
            self.layers["thresholds"].append(record.thresholds.tolist())


def train(about: dict[str, Any]) -> dict[str, Any]:
    """Trains a model.

    Args:
        about: the ``description`` of a run.

    Returns:
        All figures, as JSON can hold them.
    """
    task, steps = TASKS[about["task"]], about["steps"]
    data = data_of(task.name)
    every = max(1, len(data.validation.inputs) // FEW_EXAMPLES)
    few = data.validation.part(slice(None, None, every))
    model = task.make_model(about["seed"])
    config = None
    if about["options"] is not None:
        config = DLSConfig.from_options(**{"measure_every": 1} | about["options"])
    job = SimulatedJob(model, about["workers"], config, MEASURE_ALL, about.get("hosts"))
    if about.get("powersgd"):
        job = PowerSGDJob(model, about["workers"], about["powersgd"], about["dense_steps"])
    optimizer = optimizer_of(about, model)
    sparse = job.sessions[0].plan.sparse if job.sessions else ()
    history = History([layer.name for layer in sparse], [layer.size for layer in sparse])
    entries = sum(p.numel() for p in model.parameters())
    diverged, start = None, time.perf_counter()

    for step in range(steps):
        optimizer.param_groups[0]["lr"] = about["rate"] / task.rate * rate_at(task, step, steps)
        try:
            training_loss = job.backward(worker_loss(task, model, data, about, step))
        except NonFiniteGradientError:
            training_loss = math.nan
        if not math.isfinite(training_loss):
            diverged = step
            break
        optimizer.step()
        history.add_step(job, 4 * entries, training_loss)
        if (step + 1) * POINTS // steps > step * POINTS // steps:
            history.add_point(job, evaluate(model, few))

    final = (None, None) if diverged is not None else evaluate(model, data.validation)
    seconds = time.perf_counter() - start
    sparse_bytes, dense_bytes = np.mean(history.bytes or [[0, 0]], axis=0).tolist()
    return {
        "about": about,
        "config": None if config is None else vars(config),
        "diverged": diverged,
        "loss": finite(final[0]),
        "accuracy": finite(final[1]),
        "entries": entries,
        "entries_sent": float(np.mean(history.entries)) if history.entries else float(entries),
        "sparse_bytes": sparse_bytes,
        "dense_bytes": dense_bytes,
        "curve": {name: [*map(finite, column)] for name, column in history.curve.items()},
        "quality": history.quality,
        "shared": history.shared,
        "layers": history.layers,
        "seconds": seconds,
        "gradient_seconds": float(np.median(history.gradient_seconds or [0.0])),
        "parameters_sha256": sha256(model),
        "machine": machine(),
    }


def optimizer_of(about: dict[str, Any], model: nn.Module) -> torch.optim.Optimizer:
    """Makes the optimizer; its learning rate is set before each step."""
    if about.get("adam"):
        # Its first moment is momentum, and may be in the compressor instead.
        return torch.optim.Adam(model.parameters(), betas=(about["optimizer_momentum"], 0.999))
    return torch.optim.SGD(model.parameters(), lr=1.0, momentum=about["optimizer_momentum"])


def worker_loss(task: Task, model: nn.Module, data: Data, about: dict[str, Any], step: int) -> Any:
    """Returns a function that computes the loss of a step, given the worker's number."""
    seed, workers = about["seed"], about["workers"]
    return lambda worker: loss(task, model, batch(task, data.training, seed, step, worker, workers))


@lru_cache(maxsize=1)
def data_of(task: str) -> Data:
    """Makes the data of a task, or returns what was made last."""
    return TASKS[task].data()


def sha256(model: nn.Module) -> str:
    """Returns the SHA-256 of all parameters and buffers, bit by bit."""
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def finite(value: float | None) -> float | None:
    """Returns a number, or None for NaN and Inf, which JSON does not know."""
    return value if value is not None and math.isfinite(value) else None


def machine() -> dict[str, Any]:
    """Describes the machine and the versions of what computes."""
    return {
        "cores": os.cpu_count(),
        "processor": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
