"""Gradients and accumulators, drawn on the device."""

from __future__ import annotations

import torch
from torch import Tensor

NOISE = (
    "Laplace noise, fresh in each step, times a scale of each entry's own that is log-normal "
    "(sigma 1.5) and stays; the residual is what some steps of top-k with error feedback leave of "
    "it."
)

_SPREAD = 1.5


class Noise:
    """Heavy-tailed gradients of one layer.

    Args:
        size: entries.
        device: where.
        count: gradients to take in turns.
        seed: of the noise.
    """

    def __init__(self, size: int, device: torch.device, count: int = 4, seed: int = 0) -> None:
        self._generator = torch.Generator(device).manual_seed(seed)
        self._scale = torch.randn(size, device=device, generator=self._generator)
        self._scale.mul_(_SPREAD).exp_()
        self.gradients = [self.draw() for _ in range(count)]

    def draw(self) -> Tensor:
        """Draws a gradient: (size,) float32."""
        drawn = torch.empty_like(self._scale).exponential_(generator=self._generator)
        other = torch.empty_like(self._scale).exponential_(generator=self._generator)
        return drawn.sub_(other).mul_(self._scale)  # of two exponentials: Laplace

    def residual(self, k: int, steps: int = 6) -> Tensor:
        """Makes an accumulator: (size,) float32, of steps that each sent the k largest entries."""
        residual = torch.zeros_like(self._scale)
        for step in range(steps):
            residual.add_(self.gradients[step % len(self.gradients)])
            residual.index_fill_(0, residual.abs().topk(k, sorted=False).indices, 0)
        return residual
