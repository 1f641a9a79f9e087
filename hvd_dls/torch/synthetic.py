"""A model of which nothing is known but shapes: its gradients are noise."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

POOL = 1 << 22  # random numbers drawn in advance
SPREAD = 100.0  # between the largest and the smallest scale of layers
FORWARD = 1 / 3  # share of the forward pass in the time of both


class ShapesOnly(nn.Module):
    """Parameters that get noise as gradients, last layer first, as in any backward pass.

    Args:
        shapes: of the parameters.
        seconds: that forward and backward take together, without any exchange; each layer takes its
            share of backward by size.
        busy: whether a processor is busy meanwhile, as where one computes the gradients; otherwise
            it is asleep, as if a GPU did.
    """

    def __init__(self, shapes: Sequence[Sequence[int]], seconds: float, busy: bool) -> None:
        super().__init__()
        self._layers = nn.ParameterList([nn.Parameter(torch.zeros(*shape)) for shape in shapes])
        total = sum(layer.numel() for layer in self._layers)
        self._seconds = [(1 - FORWARD) * seconds * p.numel() / total for p in self._layers]
        self._forward_seconds, self._busy = FORWARD * seconds, busy
        self._pool = torch.randn(POOL)
        generator = torch.Generator().manual_seed(0)  # scales are the same on every rank
        exponents = torch.rand(len(self._layers), generator=generator) * math.log(SPREAD)
        self._scales = torch.exp(-exponents).tolist()

    def forward(self) -> torch.Tensor:
        """Returns the loss, which is 0."""
        _wait_until(time.perf_counter() + self._forward_seconds, self._busy)
        out = torch.zeros((), requires_grad=True)
        for position, layer in enumerate(self._layers):
            out = GivenGradient.apply(out, layer, self, position)
        return out

    def gradient(self, position: int) -> torch.Tensor:
        """Does one layer's part of backward and returns its gradient."""
        end = time.perf_counter() + self._seconds[position]
        result = torch.empty_like(self._layers[position])
        flat, scale = result.view(-1), self._scales[position]
        length = POOL // 2
        for start in range(0, len(flat), length):
            part = flat[start : start + length]
            offset = int(torch.randint(POOL - len(part) + 1, ()))
            torch.mul(self._pool[offset : offset + len(part)], scale, out=part)
        _wait_until(end, self._busy)
        return result


def _wait_until(end: float, busy: bool) -> None:
    left = end - time.perf_counter()
    if not busy and left > 0:
        time.sleep(left)
    while time.perf_counter() < end:
        pass


class GivenGradient(torch.autograd.Function):
    """Passes its input on, and gives its parameter the model's ``gradient(position)``."""

    @staticmethod
    def forward(ctx: Any, x: Any, parameter: Any, model: Any, position: int) -> Any:
        ctx.model, ctx.position = model, position
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        return upstream[0], ctx.model.gradient(ctx.position), None, None
