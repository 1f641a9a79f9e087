"""Models and steps, as users give them to ``hvd-dls advise --model``."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import nn


class Made(NamedTuple):
    """What ``hvd_dls.torch.advise`` takes.

    Attributes:
        model: to be trained.
        step: takes the model, returns its loss for a new batch.
        optimizer: makes torch's optimizer from parameters.
    """

    model: nn.Module
    step: Callable[[Any], torch.Tensor]
    optimizer: Callable[[Iterable[torch.Tensor]], torch.optim.Optimizer]


def mlp() -> Made:
    """Four linear layers, 1.3 million parameters, batches of 32."""
    torch.manual_seed(1)
    widths = (784, 640, 640, 640, 10)
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return _with_noise(nn.Sequential(*layers[:-1]), (32, 784))


def conv() -> Made:
    """Three convolutions and two linear layers, 0.6 million parameters, batches of 16."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(64, 128, 3, padding=1), nn.BatchNorm2d(128), nn.ReLU(),
        nn.Flatten(), nn.Linear(128 * 4 * 4, 256), nn.ReLU(), nn.Linear(256, 10),
    )  # fmt: skip
    return _with_noise(model, (16, 3, 16, 16))


MODELS = {"mlp": mlp, "conv": conv}


def _with_noise(model: nn.Module, shape: tuple[int, ...]) -> Made:
    """The model with batches of noise: what they hold makes no difference to the time."""

    def step(model: Any) -> torch.Tensor:
        inputs, labels = torch.randn(shape), torch.randint(10, shape[:1])
        return nn.functional.cross_entropy(model(inputs), labels)

    return Made(model, step, lambda parameters: torch.optim.SGD(parameters, lr=1e-3))
