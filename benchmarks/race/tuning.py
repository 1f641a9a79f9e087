"""Which optimizer trains a task by a method, and what it and the compressor are given."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from benchmarks.convergence.adam_ways import BETAS
from benchmarks.convergence.settings import MOMENTUM, WARMUP
from benchmarks.convergence.tasks import Task
from benchmarks.rounds.methods import Method

SPARSE_BETAS = (0.5, BETAS[1])  # of Adam in the compressor: see docs/adam.md


class Tuning(NamedTuple):
    """How a training is set up.

    Attributes:
        rate: factor on the learning rate that a task has for SGD.
        betas: of torch's Adam; None: torch's SGD.
        momentum: of SGD.
        options: of the compressor.
    """

    rate: float
    betas: tuple[float, float] | None
    momentum: float
    options: dict[str, Any]

    def optimizer(self, model: torch.nn.Module) -> torch.optim.Optimizer:
        """Makes the optimizer; the learning rate is set before each step."""
        if self.betas is not None:
            return torch.optim.Adam(model.parameters(), lr=1.0, betas=self.betas)
        return torch.optim.SGD(model.parameters(), lr=1.0, momentum=self.momentum)


def tuning(
    task: Task, method: Method, steps: int, ranks: int, first: float | None = None
) -> Tuning:
    """Returns how a task is trained by a method.

    What was found for dense training, SGD with momentum or Adam, is for local steps and PowerSGD,
    too.  Sparse methods have momentum or Adam in the compressor, as docs/adam.md recommends it, and
    their density falls in the first steps.

    Args:
        task: what is trained, with Adam if it has a learning rate for it.
        method: how gradients are exchanged.
        steps: of the whole training.
        ranks: that train it.
        first: β₁ of Adam outside of a compressor; None: the task's.
    """
    density, adam = method.density, task.adam_rate > 0
    if method.every is not None:
        density = None  # what has a density there are changes of weights, not gradients
    rate = task.adam_rate / task.rate if adam else 1.0
    if density is None:
        betas = (BETAS[0] if first is None else first, BETAS[1])
        return Tuning(rate, betas if adam else None, MOMENTUM, {})
    options: dict[str, Any] = {
        "density": density,
        "values": method.values,
        "warmup_steps": round(WARMUP.get(density, WARMUP[0.01]) * steps),
    }
    if not adam:
        options |= {"momentum": MOMENTUM, "momentum_masking": task.masking}
        return Tuning(rate, None, 0.0, options)
    # A rank's own second moment holds the noise of its own small batch.
    return Tuning(rate * ranks**0.5, None, 0.0, options | {"adam": SPARSE_BETAS})
