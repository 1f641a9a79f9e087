"""Local steps: ranks train alone, and now and then agree on common weights, as in DiLoCo."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import nn


def average_of_all(vector: torch.Tensor) -> None:
    """Makes a vector the average of all ranks', by torch.distributed as DDP does."""
    dist.all_reduce(vector.div_(dist.get_world_size()))


class Rounds:
    """The common weights of all ranks, which each round changes.

    At a round's end, what the ranks' own steps have changed is averaged and taken for a gradient,
    of which SGD with Nesterov's momentum makes the next common weights (DiLoCo, arXiv:2311.08105).
    With a learning rate of 1 and no momentum they are the average of the ranks' weights.
    Statistics of batch norm are averaged, too.

    Args:
        model: of this rank, whose weights are those of all ranks to begin with.
        rate: learning rate of a round.
        momentum: of rounds.
        average: makes a vector the average of all ranks', in place.
    """

    def __init__(
        self,
        model: nn.Module,
        rate: float,
        momentum: float,
        average: Callable[[torch.Tensor], None] = average_of_all,
    ) -> None:
        self._own = list(model.parameters())
        self._statistics = [b for b in model.buffers() if b.is_floating_point()]
        self._common = nn.Parameter(_flat(self._own))
        self._sgd = torch.optim.SGD([self._common], rate, momentum, nesterov=momentum > 0)
        self._average = average

    @torch.no_grad()
    def finish(self) -> None:
        """Ends a round: this rank's weights are the common ones now, as every rank's are."""
        change = self._common - _flat(self._own)
        vector = torch.cat([change, *(b.flatten() for b in self._statistics)])
        self._average(vector)
        self._common.grad = vector[: len(change)]
        self._sgd.step()
        _put(self._common, self._own)
        _put(vector[len(change) :], self._statistics)


def _flat(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


@torch.no_grad()
def _put(vector: torch.Tensor, tensors: Sequence[torch.Tensor]) -> None:
    for tensor, part in zip(tensors, vector.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))
