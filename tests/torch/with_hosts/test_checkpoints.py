"""Checkpoints where hosts send as one: to the bit on the same hosts, and to ranks and back."""

import tempfile
from pathlib import Path

import horovod.torch as hvd
import pytest
import torch
from torch import nn

from hvd_dls.torch import DLSCompressor, load_checkpoint, save_checkpoint
from tests.torch.with_hosts.test_hierarchical import HIERARCHICAL
from tests.torch.with_ranks.training import (
    SPARSE,
    assert_same_on_all_ranks,
    flat,
    linear_loss,
    whole_numbers,
    wrap,
)


class Two(nn.Module):
    """Two layers, of which each rank of a host sends one."""

    def __init__(self):
        super().__init__()
        self.one, self.two = (nn.Parameter(torch.zeros(30, 40)) for _ in range(2))


def start(**options):
    model, compression = Two(), DLSCompressor(density=0.1, **options)
    return model, compression, wrap(model, compression, torch.optim.SGD(model.parameters(), lr=1.0))


def train(model, optimizer, gradients):
    optimizer.zero_grad()
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        linear_loss(parameter, gradient).backward()
    optimizer.step()


def drawn(step, rank):
    return [whole_numbers((30, 40), 10 * step + layer, rank) for layer in range(2)]


@pytest.mark.parametrize("exchange", ["allgather", "sparse_allreduce"])
def test_from_hosts_to_ranks_and_back_nothing_is_lost(exchange):
    folder = Path(hvd.broadcast_object(tempfile.mkdtemp(), name="folder"))
    everything, step = torch.zeros(2, 30, 40), 0
    for options in (HIERARCHICAL, SPARSE, HIERARCHICAL, HIERARCHICAL):
        model, compression, optimizer = start(**options, exchange=exchange)
        state = load_checkpoint(folder, compression)
        if state is not None:
            model.load_state_dict(state["model"])
        for step in range(step, step + 3):  # noqa: B020 - goes on from where it was
            train(model, optimizer, drawn(step, hvd.rank()))
            for rank in range(hvd.size()):
                everything += torch.stack(drawn(step, rank)) / hvd.size()
        step += 1
        save_checkpoint(folder, {"model": model.state_dict()}, compression)
        assert not torch.allclose(-flat(model).view(2, 30, 40).float(), everything)
    for _ in range(40):  # what waits goes out
        train(model, optimizer, torch.zeros(2, 30, 40))
    moved = -torch.stack([model.one, model.two])
    torch.testing.assert_close(moved, everything, rtol=1e-5, atol=1e-3)
    assert_same_on_all_ranks(flat(model))
