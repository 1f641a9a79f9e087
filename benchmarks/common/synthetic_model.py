"""A torch model that consists of gradients only, which are noise.

They are fresh in each step, and each layer's have a scale of its own. Drawing them from a pool, at
random offsets, takes about as long as copying, so that it does not hide what is to be measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import horovod.torch as hvd
import numpy as np
import torch

from benchmarks.common.method import HOSTS_AND_OWNERS, OWNERS
from benchmarks.common.noise import make_noise
from benchmarks.common.shapes import Shapes
from hvd_dls.torch import DLSCompressor
from hvd_dls.torch.synthetic import GivenGradient

COMPRESSIONS = ("none", "fp16", "dls", "layerwise", "hierarchical", OWNERS, HOSTS_AND_OWNERS)


class Gradients:
    """Synthetic gradients, each with its own memory.

    Args:
        shapes: of the parameters.
        tail: of the noise, see ``make_noise``.
        spread: layers' scales are log-uniform between 1 / spread and 1, the same on every rank.
        seed: of the noise; each rank needs another.
        pool: entries drawn in advance.

    Attributes:
        tensors: the gradients, in the order of ``shapes``.
    """

    def __init__(
        self,
        shapes: Shapes,
        tail: str = "normal",
        spread: float = 100.0,
        seed: int = 0,
        pool: int = 1 << 22,
    ) -> None:
        self._offsets = np.random.default_rng(seed)
        self._pool = torch.from_numpy(make_noise(tail, pool, np.random.default_rng((seed, 1))))
        scales = np.random.default_rng(0).uniform(-np.log(spread), 0, len(shapes))
        self._scales = np.exp(scales).tolist()
        self.tensors = [torch.empty(shape) for shape in shapes.values()]

    def draw(self, position: int) -> torch.Tensor:
        """Draws a layer's gradient anew and returns it as a new view of its memory.

        Autograd makes a gradient that nobody else refers to ``.grad`` without copying it.
        """
        flat, scale = self.tensors[position].view(-1), self._scales[position]
        length = max(1, len(self._pool) // 2)
        for start in range(0, len(flat), length):
            part = flat[start : start + length]
            offset = int(self._offsets.integers(len(self._pool) - len(part) + 1))
            torch.mul(self._pool[offset : offset + len(part)], scale, out=part)
        return self.last_drawn(position)

    def last_drawn(self, position: int) -> torch.Tensor:
        """Returns the gradient that was drawn last as a new view of its memory."""
        tensor = self.tensors[position]
        return tensor.view(tensor.shape)

    def draw_all(self) -> None:
        """Draws all layers' gradients, for ``last_drawn`` to return."""
        for position in range(len(self.tensors)):
            self.draw(position)


class SyntheticModel(torch.nn.Module):
    """Parameters whose gradients come from elsewhere, last layer first, as in any backward pass.

    Args:
        shapes: of the parameters.
        gradient: makes the gradient of the parameter at a position; called in backward.
        stand_in: makes parameters of one number each in memory, which is read as the whole shape:
            they cannot be updated and take no room.
        backward_seconds: added to the duration of backward, each layer its share by size.
    """

    def __init__(
        self,
        shapes: Shapes,
        gradient: Callable[[int], torch.Tensor],
        stand_in: bool = False,
        backward_seconds: float = 0.0,
    ) -> None:
        super().__init__()
        self._gradient = gradient
        self._names = list(shapes)
        make = torch.zeros(1).expand if stand_in else torch.zeros
        self._parameters_in_order = [torch.nn.Parameter(make(s)) for s in shapes.values()]
        per_entry = backward_seconds / sum(p.numel() for p in self._parameters_in_order)
        self._seconds = [per_entry * p.numel() for p in self._parameters_in_order]

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Any]]:
        """Yields names and parameters, as ``torch.nn.Module`` does.

        Parameters are no attributes of the module, so that names may have any characters.
        """
        yield from zip(self._names, self._parameters_in_order, strict=True)

    def forward(self) -> torch.Tensor:
        """Returns the loss, which is 0."""
        out = torch.zeros((), requires_grad=True)
        for position, parameter in enumerate(self._parameters_in_order):
            out = GivenGradient.apply(out, parameter, self, position)
        return out

    def gradient(self, position: int) -> torch.Tensor:
        """Does one layer's part of backward and returns its gradient."""
        if self._seconds[position] > 0:
            time.sleep(self._seconds[position])
        return self._gradient(position)


class NoUpdate(torch.optim.Optimizer):
    """An optimizer that leaves the parameters alone: only Horovod's work remains of a step."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    def step(self, closure: Any = None) -> Any:
        """Does nothing."""


def make_compression(name: str, **options: Any) -> Any:
    """Returns the argument ``compression`` of ``hvd.DistributedOptimizer``.

    Args:
        name: one of COMPRESSIONS.
        **options: of DLSCompressor; ignored by Horovod's own compressions.
    """
    if name in ("none", "fp16"):
        return getattr(hvd.Compression, name)
    if name == "hierarchical":
        return DLSCompressor(hierarchical=True, **options)
    if name in (OWNERS, HOSTS_AND_OWNERS):
        return DLSCompressor(exchange=OWNERS, hierarchical=name != OWNERS, **options)
    return DLSCompressor(strategy=name, **options)
