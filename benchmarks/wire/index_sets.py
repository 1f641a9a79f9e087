"""Models, and the positions of entries that are sent: at random, clustered, and from a training.

Positions ascend, in all layers one after another.
"""

from __future__ import annotations

import numpy as np

from benchmarks.common.internals import LayerSpec, layer_spec
from benchmarks.common.shapes import resnet50


def resnet50_matrices() -> list[LayerSpec]:
    """Returns the convolutions and the classifier: 54 layers, 25.5 million entries."""
    return [layer_spec(name, shape) for name, shape in resnet50().items() if len(shape) > 1]


MODELS = {
    "ResNet-50": resnet50_matrices,
    "one layer, 25M": lambda: [layer_spec("layer", (5000, 5000))],
    "one layer, 1M": lambda: [layer_spec("layer", (1000, 1000))],
    "one layer, 100k": lambda: [layer_spec("layer", (1000, 100))],
}


def uniform(n: int, k: int, rng: np.random.Generator) -> np.ndarray:
    """Draws k of n positions at random."""
    return np.sort(rng.choice(n, k, replace=False, shuffle=False))


def clustered_gradient(layers: list[LayerSpec], rng: np.random.Generator) -> np.ndarray:
    """Draws a Gaussian gradient whose layers, rows and columns differ in scale."""
    parts = []
    for layer in layers:
        rows = layer.shape[0]
        columns = layer.size // rows
        scales = np.exp(rng.normal(0, 1, (rows, 1))) * np.exp(rng.normal(0, 1, (1, columns)))
        gradient = rng.standard_normal((rows, columns), np.float32) * scales.astype(np.float32)
        parts.append(gradient.ravel() * np.float32(np.exp(rng.normal(0, 0.5))))
    return np.concatenate(parts)


def digits_gradient(steps: int = 30) -> tuple[list[LayerSpec], np.ndarray] | None:
    """Trains a small network on handwritten digits.

    Args:
        steps: of training.

    Returns:
        The matrices among its layers, and their gradient; None without torch and scikit-learn.
    """
    try:
        import torch
        from sklearn.datasets import load_digits
    except ImportError:
        return None
    torch.manual_seed(0)
    torch.set_num_threads(1)
    data = load_digits()
    images = torch.tensor(data.data / 16, dtype=torch.float32)
    labels = torch.tensor(data.target)
    model = torch.nn.Sequential(
        torch.nn.Linear(64, 1024),
        torch.nn.ReLU(),
        torch.nn.Linear(1024, 1024),
        torch.nn.ReLU(),
        torch.nn.Linear(1024, 10),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(steps):
        batch = slice(step * 32, (step + 1) * 32)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
    weights = [(n, p) for n, p in model.named_parameters() if p.dim() == 2]
    layers = [layer_spec(name, tuple(p.shape)) for name, p in weights]
    gradients = [p.grad.numpy().ravel() for _, p in weights if p.grad is not None]
    return layers, np.concatenate(gradients)


def largest(gradient: np.ndarray, k: int) -> np.ndarray:
    """Returns the positions of the k largest entries."""
    return np.sort(np.argpartition(np.abs(gradient), len(gradient) - k)[-k:])
