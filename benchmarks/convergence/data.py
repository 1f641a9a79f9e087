"""Data that needs no download: digits, images made of them, and texts that come with Python.

It is the same in every run.
"""

from __future__ import annotations

import math
import sysconfig
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

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
    """Inputs and their targets; the first axis of both counts examples."""

    inputs: torch.Tensor
    targets: torch.Tensor

    def part(self, which: torch.Tensor | slice) -> Examples:
        """Returns some of the examples."""
        return Examples(self.inputs[which], self.targets[which])


class Data(NamedTuple):
    """Examples to train with, and examples that are held out."""

    training: Examples
    validation: Examples


def _digits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loads scikit-learn's digits.

    Returns:
        Images (n, 1, 8, 8) with values from 0 to 1, and labels (n,), of one half to train with;
        the same of the half that is held out.
    """
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(
        images.reshape(-1, 1, 8, 8) / 16, labels, test_size=0.5, random_state=0, stratify=labels
    )
    training, validation = (torch.tensor(part, dtype=torch.float32) for part in split[:2])
    return training, torch.tensor(split[2]), validation, torch.tensor(split[3])


def digits_data() -> Data:
    """Makes scikit-learn's handwritten digits."""
    training, training_labels, validation, validation_labels = _digits()
    return Data(Examples(training, training_labels), Examples(validation, validation_labels))


def images_data(n_training: int = 12_000, n_validation: int = 3_000) -> Data:
    """Makes images of a digit, turned, scaled and shifted, with a paler one over it, in noise."""
    training, training_labels, validation, validation_labels = _digits()
    generator = torch.Generator().manual_seed(0)
    return Data(
        _overlaid(training, training_labels, n_training, generator),
        _overlaid(validation, validation_labels, n_validation, generator),
    )


def _overlaid(
    images: torch.Tensor, labels: torch.Tensor, n: int, generator: torch.Generator
) -> Examples:
    """Draws n pairs of digits, one over the other, with noise and the brighter one's label."""
    wanted, other = torch.randint(len(images), (2, n), generator=generator)
    bright = _placed_at_random(images[wanted], generator)
    pale = 0.4 * _placed_at_random(images[other], generator)
    noise = 0.1 * torch.randn(bright.shape, generator=generator)
    return Examples(bright + pale + noise, labels[wanted])


def _placed_at_random(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Puts each image somewhere on a larger canvas, turned by up to 30 degrees."""
    turn, size, across, down = torch.rand(4, len(images), generator=generator) * 2 - 1
    angle, shrink = turn * math.pi / 6, 1.6 + 0.4 * size  # the canvas is so many digits wide
    sine, cosine = shrink * angle.sin(), shrink * angle.cos()
    rows = [cosine, -sine, 0.6 * across, sine, cosine, 0.6 * down]
    grid = F.affine_grid(
        torch.stack(rows, 1).reshape(-1, 2, 3), [len(images), 1, CANVAS, CANVAS], False
    )
    return F.grid_sample(images, grid, align_corners=False)


def text_data() -> Data:
    """Reads Python's reference manual, as it comes with Python; the last tenth is held out."""
    text = _encode("\n".join(topics.values()))
    held_out = len(text) // 10
    return Data(windows(text[:-held_out], WINDOW, 1), windows(text[-held_out:], WINDOW, WINDOW))


def code_data() -> Data:
    """Reads modules of Python's standard library; some of them are held out."""
    training, validation = (
        _encode("\n".join((_library() / f"{name}.py").read_text("utf-8") for name in names))
        for names in (TRAINING_SOURCES, VALIDATION_SOURCES)
    )
    return Data(windows(training, WINDOW, 1), windows(validation, WINDOW, 2 * WINDOW))


def _library() -> Path:
    """Returns the folder of Python's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def _encode(text: str) -> torch.Tensor:
    """Returns the numbers of a text's characters, (n,) int64 below CHARACTERS."""
    return torch.frombuffer(bytearray(text.encode("ascii", "replace")), dtype=torch.uint8).long()


def windows(text: torch.Tensor, length: int, step: int) -> Examples:
    """Cuts examples out of a text: a window at every ``step``-th character or token.

    The target of each is the next one.
    """
    cut = text.unfold(0, length + 1, step)
    return Examples(cut[:, :-1], cut[:, 1:])
