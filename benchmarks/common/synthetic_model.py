"""A model that consists of gradients only, and a stopwatch for what becomes of them.

Gradients are noise, fresh in each step, of a scale of each layer's own. Drawing from a pool, at
random offsets, takes about as long as copying, so that it does not hide what is to be measured.
"""

from __future__ import annotations

import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import horovod.torch as hvd
import numpy as np
import torch

from benchmarks.common.shapes import Shapes
from hvd_dls.core.balancing.controller import Controller
from hvd_dls.core.session.session import Session
from hvd_dls.torch import DLSCompressor, exchange

TAILS = ("normal", "laplace", "student")
COMPRESSIONS = ("none", "fp16", "dls", "layerwise")


class Gradients:
    """Synthetic gradients, all in memory of their own.

    Args:
        shapes: of the parameters.
        tail: of the noise: "normal", "laplace", or "student" (3 degrees of freedom).
        spread: layers' scales are log-uniform between 1 / spread and 1, the same on every rank.
        seed: of the noise; each rank needs another.
        pool: entries drawn in advance.
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
        self._pool = torch.from_numpy(_noise(tail, pool, np.random.default_rng((seed, 1))))
        scales = np.random.default_rng(0).uniform(-np.log(spread), 0, len(shapes))
        self._scales = np.exp(scales).tolist()
        self.tensors = [torch.empty(shape) for shape in shapes.values()]

    def draw(self, position: int) -> torch.Tensor:
        """Draws a layer's gradient anew: its tensor as an object of its own.

        autograd makes a gradient that nobody else refers to ``.grad`` without copying it.
        """
        flat, scale = self.tensors[position].view(-1), self._scales[position]
        length = max(1, len(self._pool) // 2)
        for start in range(0, len(flat), length):
            part = flat[start : start + length]
            offset = int(self._offsets.integers(len(self._pool) - len(part) + 1))
            torch.mul(self._pool[offset : offset + len(part)], scale, out=part)
        return self.as_drawn(position)

    def as_drawn(self, position: int) -> torch.Tensor:
        """What ``draw`` returned last."""
        tensor = self.tensors[position]
        return tensor.view(tensor.shape)

    def draw_all(self) -> None:
        """Draws all layers' gradients, for ``as_drawn`` to return."""
        for position in range(len(self.tensors)):
            self.draw(position)


def _noise(tail: str, size: int, rng: np.random.Generator) -> np.ndarray:
    if tail == "normal":
        return rng.standard_normal(size, np.float32)
    if tail == "laplace":
        return rng.laplace(0, 1, size).astype(np.float32)
    if tail == "student":
        return rng.standard_t(3, size).astype(np.float32)
    raise ValueError(f"tail {tail!r}: accepted are {', '.join(TAILS)}")


class SyntheticModel(torch.nn.Module):
    """Parameters whose gradients come from elsewhere, last layer first, as in any backward.

    Args:
        shapes: of the parameters.
        gradient: called in backward, makes the gradient of the parameter at a position.
        stand_in: parameters of one number each in memory, read as the whole shape: they cannot be
            updated and take no room.
        backward_seconds: that backward takes besides, each layer its share by size.
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
        """As ``torch.nn.Module`` does it, of names that it would not take as attributes."""
        yield from zip(self._names, self._parameters_in_order, strict=True)

    def forward(self) -> torch.Tensor:
        """The loss, 0."""
        out = torch.zeros((), requires_grad=True)
        for position, parameter in enumerate(self._parameters_in_order):
            out = _Layer.apply(out, parameter, self, position)
        return out

    def gradient_of(self, position: int) -> torch.Tensor:
        """One layer's part of backward."""
        if self._seconds[position] > 0:
            time.sleep(self._seconds[position])
        return self._gradient(position)


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, parameter: Any, model: Any, position: int) -> Any:
        ctx.model, ctx.position = model, position
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        return upstream[0], ctx.model.gradient_of(ctx.position), None, None


class Still(torch.optim.Optimizer):
    """An optimizer that leaves the parameters alone: only Horovod's work remains of a step."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    def step(self, closure: Any = None) -> Any:
        """Does nothing."""


def make_compression(name: str, **options: Any) -> Any:
    """What ``hvd.DistributedOptimizer`` takes.

    Args:
        name: one of COMPRESSIONS.
        **options: of DLSCompressor.
    """
    if name in ("none", "fp16"):
        return getattr(hvd.Compression, name)
    return DLSCompressor(strategy=name, **options)


# Where the time goes ------------------------------------------------------------------------------


class Stopwatch:
    """Seconds spent in named parts of a step, without what other named parts take within.

    Attributes:
        seconds: by the clock, of each part.
        cpu_seconds: in which this thread ran.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.cpu_seconds: dict[str, float] = defaultdict(float)
        self._inner: list[tuple[float, float]] = []

    def longest_first(self) -> list[tuple[str, float]]:
        """Parts and their seconds by the clock."""
        return sorted(self.seconds.items(), key=lambda part: -part[1])

    @contextmanager
    def watching(self) -> Iterator[Stopwatch]:
        """Times the parts of DLS and of Horovod's optimizer until the block ends."""
        import horovod.torch.optimizer as horovod_optimizer

        from hvd_dls.torch.binding import Binding

        parts = [
            (Session, "compress", "find"),
            (Session, "payload", "pack"),
            (exchange, "start", "hand over payloads"),
            (exchange, "finish", "wait for payloads"),
            (Session, "receive", "unpack"),
            (Session, "decompress", "settle"),
            (Controller, "advance", "move ratios"),
            (Binding, "compress", "binding, Python"),
            (Binding, "decompress", "binding, Python"),
            (horovod_optimizer, "allreduce_async_", "hand over allreduces"),
            (horovod_optimizer, "synchronize", "wait for allreduces"),
        ]
        before = [(owner, name, getattr(owner, name)) for owner, name, _ in parts]
        for owner, name, label in parts:
            setattr(owner, name, self._timed(getattr(owner, name), label))
        try:
            yield self
        finally:
            for owner, name, function in before:
                setattr(owner, name, function)

    def _timed(self, function: Callable[..., Any], label: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._inner.append((0.0, 0.0))
            start, cpu_start = time.perf_counter(), time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                taken, cpu = time.perf_counter() - start, time.thread_time() - cpu_start
                inner, cpu_inner = self._inner.pop()
                self.seconds[label] += taken - inner
                self.cpu_seconds[label] += cpu - cpu_inner
                if self._inner:
                    inner, cpu_inner = self._inner[-1]
                    self._inner[-1] = inner + taken, cpu_inner + cpu

        return timed
