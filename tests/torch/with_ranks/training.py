"""Models, steps and comparisons that the tests on several ranks share."""

from __future__ import annotations

import itertools

import horovod.torch as hvd
import torch
from torch import nn

# Layers are small here: nothing but vectors goes dense unless a test wants it to.
SPARSE = {"cost_rule": False, "dense_below": 0}


def net() -> nn.Sequential:
    """Convolutions, batch norm and fully connected layers; the same weights on every rank."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 1), nn.ReLU(),
        nn.Flatten(), nn.Linear(8 * 4 * 4, 32), nn.ReLU(), nn.Linear(32, 5),
    )  # fmt: skip


def net_without_vectors() -> nn.Sequential:
    """All of it is compressed, so that a second run gives the same bits.

    Horovod fuses dense tensors as they arrive and adds them up accordingly, not always alike.
    """
    linears = [nn.Linear(i, o, bias=False) for i, o in itertools.pairwise([48, 40, 30, 5])]
    return nn.Sequential(nn.Flatten(), *linears)


def wrap(model, compression, optimizer=None, **options):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return hvd.DistributedOptimizer(
        optimizer,
        named_parameters=model.named_parameters(),
        compression=compression,
        **options,
    )


def batch(step: int, dtype=torch.float32):
    """Another batch for every step and rank."""
    generator = torch.Generator().manual_seed(1000 * step + hvd.rank())
    images = torch.randn(6, 3, 4, 4, generator=generator).to(dtype)
    return images, torch.randint(0, 5, (6,), generator=generator)


def train(model, optimizer, steps, backward_passes=1):
    for step in steps:
        optimizer.zero_grad()
        for part in range(backward_passes):
            images, labels = batch(step + 10_000 * part, next(model.parameters()).dtype)
            nn.functional.cross_entropy(model(images).float(), labels).backward()
        optimizer.step()


def flat(model) -> torch.Tensor:
    return torch.cat([p.detach().double().reshape(-1) for p in model.parameters()])


def assert_same_on_all_ranks(values: torch.Tensor, name: str = "agreement") -> None:
    """Bit-identical: compared as bytes."""
    mine = values.detach().contiguous().view(-1)
    everyone = hvd.allgather(mine[None], name=name)
    for rank, theirs in enumerate(everyone):
        assert torch.equal(theirs, mine), f"rank {rank} differs from rank {hvd.rank()}"


def linear_loss(parameter: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """A loss with this gradient."""
    return (parameter * gradient).sum()


def whole_numbers(shape, step: int, rank: int | None = None, largest: int = 50) -> torch.Tensor:
    """A gradient that adds up without rounding: whole numbers, known for every rank."""
    seed = 1000 * step + (hvd.rank() if rank is None else rank)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-largest, largest + 1, tuple(shape), generator=generator).float()
