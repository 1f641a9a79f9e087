"""Tasks to train: four small models, each with data that needs no download."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.convergence.data import (
    Data,
    Examples,
    code_data,
    digits_data,
    images_data,
    text_data,
)
from benchmarks.convergence.models import (
    DigitsNet,
    LongShortTermMemory,
    ResidualNet,
    Transformer,
)


@dataclass(frozen=True)
class Task:
    """A model and data to train it with.

    Attributes:
        name: as on the command line.
        about: model and data in a line.
        model: makes the model; its output has a score for each class on the last axis.
        output: name of the last layer's weights.
        data: makes the data.
        rate: peak learning rate of SGD, the best found for dense training.
        steps: of a run.
        batch: examples of all workers in a step, whatever the number of workers.
        accuracy: whether the metric is the share of examples recognised, and not the loss in nats.
        adam_rate: peak learning rate of Adam; 0 if none was looked for.
        masking: whether momentum correction clears the momentum of entries that are sent, the
            better of both for DLS at 1 %.
        longer: factor on the steps of longer runs.
    """

    name: str
    about: str
    model: Callable[[], nn.Module]
    output: str
    data: Callable[[], Data]
    rate: float
    steps: int
    batch: int
    accuracy: bool
    adam_rate: float = 0.0
    masking: bool = True
    longer: int = 4

    def make_model(self, seed: int) -> nn.Module:
        """Makes the model, with weights that follow from a seed."""
        torch.manual_seed(seed)
        return self.model()


def loss(task: Task, model: nn.Module, examples: Examples) -> torch.Tensor:
    """Computes the loss of training: mean cross entropy.

    Where the metric is accuracy, labels are smoothed so that gradients stay steady: a loss near
    zero would leave gradients that come in bursts.
    """
    scores, targets = model(examples.inputs).flatten(0, -2), examples.targets.flatten()
    return F.cross_entropy(scores, targets, label_smoothing=0.1 if task.accuracy else 0.0)


@torch.no_grad()
def evaluate(model: nn.Module, examples: Examples, at_once: int = 250) -> tuple[float, float]:
    """Computes the loss in nats and the share of right answers, ``at_once`` examples at a time."""
    model.eval()
    nats, right = 0.0, 0
    for start in range(0, len(examples.inputs), at_once):
        part = examples.part(slice(start, start + at_once))
        scores, targets = model(part.inputs).flatten(0, -2), part.targets.flatten()
        nats += F.cross_entropy(scores, targets, reduction="sum").item()
        right += int((scores.argmax(-1) == targets).sum())
    model.train()
    return nats / examples.targets.numel(), right / examples.targets.numel()


def batch(task: Task, data: Examples, seed: int, step: int, worker: int, workers: int) -> Examples:
    """Returns a worker's part of a step's batch.

    An epoch has every example once, in an order that follows from seed and epoch.

    Args:
        task: says how many examples a batch has.
        data: all examples.
        seed: of the run.
        step: its number, from 0.
        worker: its number, from 0.
        workers: how many there are.
    """
    steps_an_epoch = len(data.inputs) // task.batch
    order = _order(len(data.inputs), seed, step // steps_an_epoch)
    each = task.batch // workers
    start = step % steps_an_epoch * task.batch + worker * each
    return data.part(order[start : start + each])


@lru_cache(maxsize=2)
def _order(n: int, seed: int, epoch: int) -> torch.Tensor:
    """Returns an order of n examples."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(10_000 * seed + epoch))


def rate_at(task: Task, step: int, steps: int) -> float:
    """Returns the learning rate: it rises for a tenth of the steps, then falls as a cosine."""
    rising = max(1, steps // 10)
    if step < rising:
        return task.rate * (step + 1) / rising
    return task.rate * 0.5 * (1 + math.cos(math.pi * (step - rising) / (steps - rising)))


TASKS = {
    task.name: task
    for task in (
        Task(
            "digits",
            "convolutional net with batch norm on scikit-learn's handwritten digits",
            DigitsNet,
            "16.weight",
            digits_data,
            rate=0.2,
            steps=300,
            batch=128,
            accuracy=True,
        ),
        Task(
            "images",
            "residual net with batch norm on the brighter of two overlapping digits in noise",
            ResidualNet,
            "8.weight",
            images_data,
            rate=0.4,
            steps=500,
            batch=128,
            accuracy=True,
        ),
        Task(
            "text",
            "recurrent character language model (LSTM) on Python's reference manual",
            LongShortTermMemory,
            "out.weight",
            text_data,
            rate=3.0,
            steps=800,
            batch=32,
            accuracy=False,
        ),
        Task(
            "code",
            "causal character Transformer of two blocks on modules of Python's standard library",
            Transformer,
            "out.weight",
            code_data,
            rate=0.7,
            steps=2400,
            batch=32,
            accuracy=False,
            adam_rate=0.006,
            masking=False,
            longer=2,
        ),
    )
}
