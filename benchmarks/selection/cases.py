"""Layers to select from: drawn at random, or recorded from a training."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_digits

from benchmarks.common.internals import settle
from benchmarks.selection.methods import find_finite


class Case(NamedTuple):
    """One step of one layer.

    Attributes:
        residual: (n,) float32.
        gradient: (n,) float32.
        before: (n,) float32, residual + gradient one step before.
    """

    residual: np.ndarray
    gradient: np.ndarray
    before: np.ndarray


def normal(n: int) -> Case:
    """Draws independent normal entries."""
    rng = np.random.default_rng(0)
    draw = [rng.standard_normal(n, dtype=np.float32) for _ in range(3)]
    return Case(draw[0], 0.3 * draw[1], draw[0] + 0.3 * draw[2])


def heavy(n: int) -> Case:
    """Draws Laplace entries of scales that spread over decades."""
    rng = np.random.default_rng(0)
    scale = np.exp(1.5 * rng.standard_normal(n, dtype=np.float32))
    draw = [scale * rng.laplace(size=n).astype(np.float32) for _ in range(3)]
    return Case(draw[0], 0.3 * draw[1], draw[0] + 0.3 * draw[2])


def real(n: int) -> Case:
    """Takes gradients and residuals from the training of a small network, step after step."""
    recorded = record()
    return Case(*(np.resize(recorded[name], n) for name in Case._fields))


@functools.cache
def record(steps: int = 50, density: float = 0.01) -> dict[str, np.ndarray]:
    """Trains a convolutional network (546,000 parameters) on scikit-learn's digits, with top-k.

    Returns:
        The fields of ``Case``, of all steps one after another.
    """
    torch.manual_seed(0)
    x, y = load_digits(return_X_y=True)
    images, labels = torch.tensor(x / 16, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(y)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 32, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.Conv2d(32, 64, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(4096, 128),
        torch.nn.ReLU(),
        torch.nn.Linear(128, 10),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    parts: dict[str, list[np.ndarray]] = {name: [] for name in Case._fields}
    residual = np.zeros(sum(p.numel() for p in model.parameters()), np.float32)
    before = residual.copy()
    for step in range(steps + 10):
        batch = torch.randint(0, len(images), (32,))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
        gradients = [p.grad.numpy().ravel() for p in model.parameters() if p.grad is not None]
        gradient = np.concatenate(gradients)
        if step >= 10:  # the residuals have filled
            for name, values in zip(Case._fields, (residual, gradient, before), strict=True):
                parts[name].append(values.copy())
        before = residual + gradient
        found = find_finite(residual, gradient, int(density * len(residual)))
        settle(residual, gradient, found.indices, None, [], 1.0, np.empty_like(gradient))
        optimizer.step()
    return {name: np.concatenate(values) for name, values in parts.items()}


DATA: dict[str, Callable[[int], Case]] = {"normal": normal, "heavy": heavy, "real": real}
