"""What convergence.py trains: four tasks whose data needs no download, each with a small model.

Data and models are the same in every run: they follow from fixed seeds, scikit-learn's digits and
the text and sources that come with Python.
"""

from __future__ import annotations

import math
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

CHARACTERS = 128  # of ASCII; what else there is in a text is replaced by one of them
WINDOW = 32  # characters of a text that are one example
CANVAS = 16  # edge of the generated images
# Modules that are a file of their own in each of Python's versions that are supported.
TRAINING_SOURCES = (
    *("argparse", "ast", "configparser", "difflib", "doctest", "fractions", "inspect", "ipaddress"),
    *("mailbox", "optparse", "pickle", "random", "statistics", "subprocess", "tarfile"),
)
VALIDATION_SOURCES = ("textwrap", "threading", "typing")


class Examples(NamedTuple):
    """Inputs and what to say of them; the first axis of both counts examples."""

    inputs: torch.Tensor
    targets: torch.Tensor

    def part(self, which: torch.Tensor | slice) -> Examples:
        return Examples(self.inputs[which], self.targets[which])


class Data(NamedTuple):
    """What is trained on, and what is held out."""

    training: Examples
    validation: Examples


# Models -------------------------------------------------------------------------------------------


class DigitsNet(nn.Sequential):
    """3x3 and 1x1 convolutions, batch norm and two fully connected layers."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
            nn.Conv2d(64, 32, 1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(64 * 4 * 4, 128), nn.ReLU(), nn.Linear(128, 10),
        )  # fmt: skip


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions that halve the image, and a 1x1 convolution around them."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, out, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(out),
            nn.ReLU(),
            nn.Conv2d(out, out, 3, padding=1, bias=False), nn.BatchNorm2d(out),
        )  # fmt: skip
        self.around = nn.Sequential(
            nn.Conv2d(channels, out, 1, stride=2, bias=False), nn.BatchNorm2d(out)
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return F.relu(self.body(images) + self.around(images))


class ResidualNet(nn.Sequential):
    """Three residual blocks with batch norm, from 16 channels to 128."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
            ResidualBlock(16, 32), ResidualBlock(32, 64), ResidualBlock(64, 128),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10),
        )  # fmt: skip


class LongShortTermMemory(nn.Module):
    """A character language model with one recurrent layer."""

    def __init__(self, width: int = 192) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CHARACTERS, 64)
        self.recurrent = nn.LSTM(64, width, batch_first=True)
        self.out = nn.Linear(width, CHARACTERS)

    def forward(self, characters: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.out(self.recurrent(self.embedding(characters))[0])
        return logits


class Attention(nn.Module):
    """Of each position to those before it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.enter, self.leave = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        batch, length, width = hidden.shape
        split = self.enter(hidden).reshape(batch, length, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        left: torch.Tensor = self.leave(mixed.transpose(1, 2).reshape(batch, length, width))
        return left


class TransformerBlock(nn.Module):
    """Attention and a network of two layers, each behind a layer norm and with a way around it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.Sequential(nn.LayerNorm(width), Attention(width, heads))
        self.forward_layers = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self.attention(hidden)
        summed: torch.Tensor = hidden + self.forward_layers(hidden)
        return summed


class Transformer(nn.Module):
    """A causal character language model with two blocks."""

    def __init__(self, width: int = 96, heads: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CHARACTERS, width)
        self.position = nn.Parameter(0.02 * torch.randn(WINDOW, width))
        blocks = [TransformerBlock(width, heads) for _ in range(2)]
        self.blocks = nn.Sequential(*blocks, nn.LayerNorm(width))
        self.out = nn.Linear(width, CHARACTERS)

    def forward(self, characters: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.out(self.blocks(self.embedding(characters) + self.position))
        return logits


# Data ---------------------------------------------------------------------------------------------


def _digits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images (n, 1, 8, 8) with values from 0 to 1, and labels: half to train, half held out."""
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(
        images.reshape(-1, 1, 8, 8) / 16, labels, test_size=0.5, random_state=0, stratify=labels
    )
    training, validation = (torch.tensor(part, dtype=torch.float32) for part in split[:2])
    return training, torch.tensor(split[2]), validation, torch.tensor(split[3])


def digits_data() -> Data:
    training, training_labels, validation, validation_labels = _digits()
    return Data(Examples(training, training_labels), Examples(validation, validation_labels))


def images_data(n_training: int = 12_000, n_validation: int = 3_000) -> Data:
    """A digit, turned, scaled and shifted, with a paler one over it, in noise."""
    training, training_labels, validation, validation_labels = _digits()
    generator = torch.Generator().manual_seed(0)
    return Data(
        _overlaid(training, training_labels, n_training, generator),
        _overlaid(validation, validation_labels, n_validation, generator),
    )


def _overlaid(
    images: torch.Tensor, labels: torch.Tensor, n: int, generator: torch.Generator
) -> Examples:
    wanted, other = torch.randint(len(images), (2, n), generator=generator)
    canvas = _thrown(images[wanted], generator) + 0.4 * _thrown(images[other], generator)
    return Examples(canvas + 0.1 * torch.randn(canvas.shape, generator=generator), labels[wanted])


def _thrown(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Each image somewhere on a larger canvas, turned by up to 30 degrees."""
    turn, size, across, down = torch.rand(4, len(images), generator=generator) * 2 - 1
    angle, shrink = turn * math.pi / 6, 1.6 + 0.4 * size  # the canvas is so many digits wide
    sine, cosine = shrink * angle.sin(), shrink * angle.cos()
    rows = [cosine, -sine, 0.6 * across, sine, cosine, 0.6 * down]
    grid = F.affine_grid(
        torch.stack(rows, 1).reshape(-1, 2, 3), [len(images), 1, CANVAS, CANVAS], False
    )
    return F.grid_sample(images, grid, align_corners=False)


def text_data() -> Data:
    """Python's reference manual, as it comes with Python; the last tenth is held out."""
    text = _coded("\n".join(topics.values()))
    held_out = len(text) // 10
    return Data(_windows(text[:-held_out], 1), _windows(text[-held_out:], WINDOW))


def code_data() -> Data:
    """Modules of Python's standard library; some of them are held out."""
    training, validation = (
        _coded("\n".join((_library() / f"{name}.py").read_text("utf-8") for name in names))
        for names in (TRAINING_SOURCES, VALIDATION_SOURCES)
    )
    return Data(_windows(training, 1), _windows(validation, 2 * WINDOW))


def _library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _coded(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(text.encode("ascii", "replace")), dtype=torch.uint8).long()


def _windows(text: torch.Tensor, step: int) -> Examples:
    """A window that begins at each ``step``-th character; what to say is the next character."""
    windows = text.unfold(0, WINDOW + 1, step)
    return Examples(windows[:, :-1], windows[:, 1:])


# Tasks --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """Something to learn.

    Attributes:
        name: as on the command line.
        about: model and data in a line.
        model: makes the model; its output has a score for each class on the last axis.
        output: name of the last layer's weights.
        data: makes the data.
        rate: peak learning rate, the best found for dense training.
        steps: of a run.
        batch: examples of all workers in a step, so that runs differ in nothing else.
        adam_rate: the same for Adam; 0 if it was not looked for.
        masking: whether momentum correction clears the momentum of entries that are sent, the
            better of both for DLS at 1 %.
        longer: factor on the steps of longer runs.
        accuracy: whether the metric is the share of examples recognised, and not the loss in nats.
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
        torch.manual_seed(seed)
        return self.model()


def loss(task: Task, model: nn.Module, examples: Examples) -> torch.Tensor:
    """What is minimised: mean cross entropy; with labels smoothed, so that gradients stay steady.

    (A loss near zero would leave gradients that come in bursts.)
    """
    scores, targets = model(examples.inputs).flatten(0, -2), examples.targets.flatten()
    return F.cross_entropy(scores, targets, label_smoothing=0.1 if task.accuracy else 0.0)


@torch.no_grad()
def evaluate(model: nn.Module, examples: Examples, at_once: int = 250) -> tuple[float, float]:
    """Loss in nats, and share of right answers."""
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
    """A worker's part of a step's batch: every example once an epoch, in an order of its own."""
    steps_an_epoch = len(data.inputs) // task.batch
    order = _order(len(data.inputs), seed, step // steps_an_epoch)
    each = task.batch // workers
    start = step % steps_an_epoch * task.batch + worker * each
    return data.part(order[start : start + each])


@lru_cache(maxsize=2)
def _order(n: int, seed: int, epoch: int) -> torch.Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(10_000 * seed + epoch))


def rate_at(task: Task, step: int, steps: int) -> float:
    """The learning rate: up to its peak in the first tenth of the steps, then down as a cosine."""
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
