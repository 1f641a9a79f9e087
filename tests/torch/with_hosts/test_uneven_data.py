"""Ranks with different numbers of batches, where hosts send as one: 2 + 2 ranks, 1 + 2."""

import horovod.torch as hvd
import pytest
import torch
from torch import nn

from hvd_dls import NonFiniteGradientError, RanksDisagreeError
from hvd_dls.torch import DLSCompressor, join
from tests.torch.with_hosts.test_hierarchical import HIERARCHICAL, HOSTS, plain_sgd, residuals_of
from tests.torch.with_ranks.test_uneven_data import as_horovod_trains, batches, loss_of, train
from tests.torch.with_ranks.training import (
    assert_same_on_all_ranks,
    flat,
    linear_loss,
    net,
    whole_numbers,
    wrap,
)


def start(**options):
    torch.manual_seed(1)
    model = net()
    compression = DLSCompressor(**{"density": 0.05, **HIERARCHICAL, **options})
    sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return model, compression, wrap(model, compression, sgd)


def test_join_at_density_one_trains_as_horovod_does_with_its_join():
    expected = as_horovod_trains(
        lambda model: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), epochs=2
    )
    model, _, optimizer = start(density=1.0)
    for epoch in range(2):
        with join(optimizer) as joined:
            train(model, optimizer, batches(epoch))
        assert joined.last_rank == 0
        assert joined.extra_steps == len(batches(rank=0)) - len(batches())
    torch.testing.assert_close(flat(model), expected, rtol=1e-4, atol=1e-5)
    assert_same_on_all_ranks(flat(model))


@pytest.mark.parametrize("uneven", ["first rank has most", "last rank has most"])
def test_join_loses_nothing_that_was_accumulated(uneven):
    """Also where a whole host has no data any more, and where it has none from the start."""
    shapes = [(40, 30), (100, 30)]
    model = nn.ParameterList([torch.zeros(shape) for shape in shapes])
    compression = DLSCompressor(density=0.05, **HIERARCHICAL)
    optimizer = wrap(model, compression, plain_sgd(model, lr=1), op=hvd.Sum)

    def count(rank):
        return 2 * (rank if uneven.startswith("last") else hvd.size() - 1 - rank)

    with join(optimizer):
        for step in range(count(hvd.rank())):
            optimizer.zero_grad()
            for p in model:
                linear_loss(p, whole_numbers(p.shape, step)).backward()
            optimizer.step()
    assert compression.last_step().step == count(0) + count(hvd.size() - 1)
    of_a_host = hvd.size() / len(HOSTS[hvd.size()])  # what a host's average is multiplied by
    off = 0 if hvd.size() == 4 else 1e-3  # else thirds are rounded
    for i, p in enumerate(model):
        accumulated = sum(
            whole_numbers(p.shape, step, rank)
            for rank in range(hvd.size())
            for step in range(count(rank))
        )
        own = residuals_of(compression).get(str(i), torch.zeros(p.numel()))
        kept = of_a_host * hvd.allreduce(own, op=hvd.Sum, name=f"kept.{i}").reshape(p.shape)
        assert kept.abs().sum() > 0
        torch.testing.assert_close(kept - p.detach(), accumulated, rtol=off, atol=20 * off)
    assert_same_on_all_ranks(flat(model))
    assert_same_on_all_ranks(torch.tensor(compression.last_step().k.tolist()))


@pytest.mark.parametrize("culprit", [0, 1])
def test_an_exception_within_join_ends_the_loops_of_all(culprit):
    """Of a rank whose host sends a gradient sum of two, while the last rank is without data."""
    model, compression, optimizer = start()

    def loop():
        with join(optimizer):
            for step in batches():
                optimizer.zero_grad()
                if hvd.rank() == culprit and step == 1:
                    raise KeyError("a user's error")
                loss_of(model, step).backward()
                optimizer.step()

    raised = KeyError if hvd.rank() == culprit else RanksDisagreeError
    with pytest.raises(raised, match=r"user|rank"):
        loop()
    compression.abandon_step()
    with join(optimizer) as joined:
        train(model, optimizer, batches(1))
    assert joined.extra_steps == len(batches(rank=0)) - len(batches())
    assert_same_on_all_ranks(flat(model))


def test_nan_within_join_is_refused_by_all():
    model, _, optimizer = start()

    def loop():
        with join(optimizer):
            for step in batches():
                optimizer.zero_grad()
                factor = torch.nan if step == 1 and hvd.rank() == 0 else 1.0
                (loss_of(model, step) * factor).backward()
                optimizer.step()

    with pytest.raises(NonFiniteGradientError):
        loop()
    assert_same_on_all_ranks(flat(model))
