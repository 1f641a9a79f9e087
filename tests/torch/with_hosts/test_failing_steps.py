"""A step that cannot be made on one rank of two hosts: 2 + 2 ranks, 1 + 2."""

import time

import horovod.torch as hvd
import pytest
import torch
from torch import nn

from hvd_dls.core.session.groups import Groups
from hvd_dls.errors import NonFiniteGradientError, RanksDisagreeError
from hvd_dls.torch import DLSCompressor
from tests.torch.with_hosts.test_hierarchical import (
    HIERARCHICAL,
    OWNERS,
    residuals_of,
    session_of,
)
from tests.torch.with_ranks.training import (
    assert_same_on_all_ranks,
    batch,
    flat,
    net,
    train,
    wrap,
)

EXCHANGES = pytest.mark.parametrize("options", [HIERARCHICAL, OWNERS], ids=["allgather", "owners"])


@EXCHANGES
@pytest.mark.parametrize("culprit", range(3))
@pytest.mark.parametrize("vector", [False, True])
def test_nan_on_one_rank_refuses_the_step_on_all(culprit, vector, options):
    model = net()
    compression = DLSCompressor(density=0.05, **options)
    optimizer = wrap(model, compression)
    train(model, optimizer, range(2))
    before, residuals = flat(model), {n: r.clone() for n, r in residuals_of(compression).items()}
    optimizer.zero_grad()
    images, labels = batch(5)
    loss = nn.functional.cross_entropy(model(images), labels)
    if hvd.rank() == culprit:
        parameter = model[0].bias if vector else model[0].weight
        loss = loss + (parameter * torch.nan).sum()
    loss.backward()
    with pytest.raises(NonFiniteGradientError) as error:
        optimizer.step()
    name = "0.bias" if vector else "0.weight"
    session = session_of(compression)
    senders = session.routing.senders[session.bucket_of(name)]
    host = Groups(session.groups.sizes, culprit).own
    assert error.value.where == [(name, senders[host])]
    assert f"layer {name!r} on the host of rank {senders[host]};" in str(error.value)
    assert torch.equal(flat(model), before)
    assert all(torch.equal(residuals[n], r) for n, r in residuals_of(compression).items())
    train(model, optimizer, range(2, 4))
    assert compression.last_step().step == 4
    assert_same_on_all_ranks(flat(model))


@EXCHANGES
def test_nan_is_skipped_by_all(options):
    model = net()
    compression = DLSCompressor(density=0.05, nonfinite="skip", **options)
    optimizer = wrap(model, compression)
    train(model, optimizer, range(2))
    before = flat(model)
    optimizer.zero_grad()
    images, labels = batch(5)
    factor = torch.inf if hvd.rank() == hvd.size() - 1 else 1.0
    (nn.functional.cross_entropy(model(images), labels) * factor).backward()
    optimizer.step()
    assert torch.equal(flat(model), before)
    train(model, optimizer, range(2, 4))
    assert compression.last_step().step == 4
    assert_same_on_all_ranks(flat(model))


@EXCHANGES
@pytest.mark.parametrize("culprit", range(3))
@pytest.mark.parametrize("layer", [0, 2, 4], ids="at layer {}".format)
def test_a_step_that_one_rank_gives_up_is_given_up_by_all(culprit, layer, options):
    model = nn.Sequential(*(nn.Linear(48, 48) for _ in range(5)))
    compression = DLSCompressor(density=0.05, bucket_bytes=8000, **options)
    optimizer = wrap(model, compression)

    def backward(seed):
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(seed + hvd.rank())
        model(torch.randn(4, 48, generator=generator)).square().mean().backward()

    for seed in range(2):
        backward(10 * seed)
        optimizer.step()
    before = flat(model)
    if hvd.rank() == culprit:

        def stop(gradient):
            raise ValueError("stop here")

        hook = model[layer].weight.register_hook(stop)
        with pytest.raises(ValueError, match="stop here"):
            backward(50)
        hook.remove()
        compression.abandon_step()
    else:

        def step():
            backward(50)
            optimizer.step()

        with pytest.raises(RanksDisagreeError, match=r"gave step 3 up"):
            step()
    assert torch.equal(flat(model), before)
    for seed in range(6, 9):
        backward(10 * seed)
        optimizer.step()
    assert compression.last_step().step == 5
    assert_same_on_all_ranks(flat(model))


@EXCHANGES
def test_ranks_may_call_other_operations_in_different_orders(options):
    """A rank that waits elsewhere still sends on what others wait for in their step."""
    model = net()
    compression = DLSCompressor(density=0.05, **options)
    optimizer = wrap(model, compression)
    for step in range(6):
        optimizer.zero_grad()
        images, labels = batch(step)
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        if (hvd.rank() + step) % 2:
            hvd.allreduce(loss.detach(), name="loss")
            optimizer.step()
        else:
            optimizer.step()
            hvd.allreduce(loss.detach(), name="loss")
    assert_same_on_all_ranks(flat(model))


@EXCHANGES
def test_a_name_still_in_use_by_a_step_given_up_is_freed_without_this_rank(options):
    """Twice in a row, while others are late: what waits for the name goes out by itself.

    Late enough for the step not to be complete on rank 1, whose thread sends, when it is given up.
    """
    model = nn.Sequential(*(nn.Linear(48, 48) for _ in range(3)))
    compression = DLSCompressor(density=0.05, bucket_bytes=8000, **options)
    optimizer = wrap(model, compression)

    def backward():
        optimizer.zero_grad()
        model(torch.ones(2, 48)).square().mean().backward()

    backward()
    optimizer.step()
    for _ in range(3):
        if hvd.rank() == 1:
            for _ in range(2):
                backward()
                compression.abandon_step()
            hvd.allreduce(torch.ones(1), name="elsewhere")
        else:
            for _ in range(2):
                time.sleep(0.5)
                backward()
                with pytest.raises(RanksDisagreeError):
                    optimizer.step()
            hvd.allreduce(torch.ones(1), name="elsewhere")
    backward()
    optimizer.step()
    assert_same_on_all_ranks(flat(model))
