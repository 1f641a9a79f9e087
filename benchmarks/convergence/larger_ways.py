"""Larger models, and the ways to train them: a new way is a new line in METHODS."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks.convergence.data import images_data
from benchmarks.convergence.library import LENGTH, TOKENS, library_data, manual_data
from benchmarks.convergence.models import ResidualNet, TokenTransformer
from benchmarks.convergence.settings import MOMENTUM, WARMUP, WORKERS
from benchmarks.convergence.tasks import Task

BETAS = (0.9, 0.999)  # of dense training
ADAM_MOMENTUM = 0.5  # in the compressor: see docs/adam.md
VERSION = 1  # of what a training does and keeps


class Larger(NamedTuple):
    """What is trained.

    Attributes:
        task: model, data, learning rate, steps and batch.
        adam: whether AdamW takes the place of SGD with momentum.
        decay: weight decay of AdamW, of matrices alone.
        clip: limit of the averaged gradient's global norm; None: not clipped.
        base: model whose weights, after dense training, it begins with; None: it has its own.
    """

    task: Task
    adam: bool = False
    decay: float = 0.0
    clip: float | None = None
    base: str | None = None


class Method(NamedTuple):
    """A way to train.

    Attributes:
        title: its name in the table.
        density: of the compressor; None: none.
        options: of the compressor, beside the density and what the model wants.
        rank: of PowerSGD; None: another way.
        adam_in_front: whether the compressor has both of Adam's moments, and what it hands on is
            subtracted as it comes.
        rate: factor on the learning rate.
        first: β₁ of Adam where there is no compressor, or PowerSGD.
    """

    title: str
    density: float | None = None
    options: dict[str, Any] = {}  # noqa: RUF012 (never changed)
    rank: int | None = None
    adam_in_front: bool = False
    rate: float = 1.0
    first: float = BETAS[0]


METHODS = {
    "dense": Method("dense"),
    "dense-0.5": Method("dense, β₁ = 0.5", first=0.5),
    "dense-0": Method("dense, β₁ = 0", first=0.0),
    "dense-0.5-double": Method("dense, β₁ = 0.5, twice the learning rate", first=0.5, rate=2.0),
    "dense-half": Method("dense, half the learning rate", rate=0.5),
    "dls": Method("DLS, 1 %", 0.01),
    "dls-0.001": Method("DLS, 0.1 %", 0.001),
    "dls-double": Method("DLS, 1 %, twice the learning rate", 0.01, rate=2.0),
    "dls-adam": Method("DLS, 1 %, Adam in the compressor", 0.01, adam_in_front=True, rate=2.0),
    "dls-adam-0.001": Method(
        "DLS, 0.1 %, Adam in the compressor", 0.001, adam_in_front=True, rate=2.0
    ),
    "dls-adam-0.03": Method("DLS, 3 %, Adam in the compressor", 0.03, adam_in_front=True, rate=2.0),
    "dls-adam-0.1": Method("DLS, 10 %, Adam in the compressor", 0.1, adam_in_front=True, rate=2.0),
    "layerwise": Method("layer-wise top-k, 1 %", 0.01, {"strategy": "layerwise"}),
    "powersgd": Method("PowerSGD, rank 4", rank=4),
}


def _transformer() -> nn.Module:
    return TokenTransformer(TOKENS, LENGTH, width=256, blocks=6)


def _residual_net() -> nn.Module:
    return ResidualNet(width=32)


MODELS = {
    "transformer": Larger(
        Task(
            "transformer",
            "causal Transformer of six blocks on byte-pair tokens of Python's standard library",
            _transformer,
            "embedding.weight",
            library_data,
            rate=0.001,
            steps=1000,
            batch=16,
            accuracy=False,
        ),
        adam=True,
        decay=0.1,
        clip=1.0,
    ),
    "finetuned": Larger(
        Task(
            "finetuned",
            "the Transformer above, trained, on Python's reference manual",
            _transformer,
            "embedding.weight",
            manual_data,
            rate=0.0003,
            steps=300,
            batch=16,
            accuracy=False,
        ),
        adam=True,
        decay=0.1,
        clip=1.0,
        base="transformer",
    ),
    "resnet": Larger(
        Task(
            "resnet",
            "residual net with batch norm on the brighter of two overlapping digits in noise",
            _residual_net,
            "8.weight",
            images_data,
            rate=0.2,
            steps=1000,
            batch=128,
            accuracy=True,
        )
    ),
}


def suits(model: str, name: str) -> bool:
    """Whether a method is for a model: what has other betas is only for what Adam trains."""
    method = METHODS[name]
    return MODELS[model].adam or not (method.adam_in_front or method.first != BETAS[0])


def description(model: str, name: str, seed: int, steps: int | None = None) -> dict[str, Any]:
    """Returns all that a training follows from, as JSON has it."""
    larger, method = MODELS[model], METHODS[name]
    task, steps = larger.task, steps or larger.task.steps
    betas = [method.first, BETAS[1]] if larger.adam else None
    about: dict[str, Any] = {
        "version": VERSION,
        "model": model,
        "method": name,
        "workers": WORKERS,
        "seed": seed,
        "steps": steps,
        "rate": method.rate * task.rate,
        "batch": task.batch,
        "options": None,
        "momentum": 0.0 if larger.adam else MOMENTUM,
        "betas": betas,
        # As much as at the usual learning rate.
        "decay": larger.decay / method.rate,
        "clip": larger.clip,
    }
    if method.rank is not None:
        about |= {"powersgd": method.rank, "dense_steps": round(WARMUP[0.01] * steps)}
    if method.density is None:
        return about
    options: dict[str, Any] = {
        "density": method.density,
        "warmup_steps": round(WARMUP.get(method.density, WARMUP[0.01]) * steps),
        "measure_every": 0,
    }
    if method.adam_in_front:
        options["adam"] = [ADAM_MOMENTUM, BETAS[1]]
    elif larger.adam:
        options |= {"momentum": ADAM_MOMENTUM, "momentum_masking": False}
    else:
        options |= {"momentum": MOMENTUM, "momentum_masking": task.masking}
    if larger.clip is not None:
        # A worker's own gradient is longer than the average: see docs/tuning.md.
        options["clip_global_norm"] = larger.clip * math.sqrt(WORKERS)
    return about | {
        "options": options | method.options,
        "momentum": 0.0,
        "betas": [0.0, BETAS[1]] if larger.adam and not method.adam_in_front else None,
        "clip": None,
    }


def optimizer_of(about: dict[str, Any], model: nn.Module) -> torch.optim.Optimizer:
    """Makes the optimizer; the learning rate of each group is set before each step."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": about["decay"]},
        {"params": others, "weight_decay": 0.0},
    ]
    if about["betas"] is not None:
        return torch.optim.AdamW(groups, lr=1.0, betas=tuple(about["betas"]))
    # Behind Adam in the compressor, SGD's weight decay is a decoupled one.
    return torch.optim.SGD(groups, lr=1.0, momentum=about["momentum"])
