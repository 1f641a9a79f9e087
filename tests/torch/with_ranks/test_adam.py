"""``adam=``: what must be behind it, and what it must see."""

import horovod.torch as hvd
import pytest
import torch
from torch import nn

from hvd_dls.errors import DLSError
from hvd_dls.torch import DLSCompressor
from tests.torch.with_ranks.training import (
    SPARSE,
    assert_same_on_all_ranks,
    flat,
    net,
    train,
    wrap,
)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.0625)


@pytest.mark.parametrize(
    ("make", "given"),
    [
        (
            lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9),
            "SGD with momentum=0.9",
        ),
        (lambda parameters: torch.optim.AdamW(parameters, betas=(0.0, 0.999)), "AdamW"),
        (torch.optim.RMSprop, "RMSprop"),
    ],
    ids=["SGD", "AdamW", "RMSprop"],
)
def test_adam_needs_plain_sgd(make, given):
    model = net()
    optimizer = wrap(model, DLSCompressor(adam=(0.5, 0.999), **SPARSE), make(model.parameters()))
    with pytest.raises(DLSError, match=rf"plain torch.optim.SGD, and it is {given}.*: make it"):
        train(model, optimizer, [0])


def test_momentum_that_a_scheduler_sets_later_is_refused():
    model = net()
    optimizer = wrap(model, DLSCompressor(adam=(0.5, 0.999), **SPARSE), sgd(model))
    train(model, optimizer, range(2))
    torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10)
    with pytest.raises(DLSError, match=r"plain torch.optim.SGD, and it is SGD with momentum=0.9"):
        train(model, optimizer, range(2, 4))


@pytest.mark.parametrize("layer", [0, 1], ids=["goes dense", "compressed"])
def test_a_gradient_whose_square_overflows_makes_the_largest_update(layer):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 60), nn.Linear(60, 5))
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    optimizer = wrap(model, DLSCompressor(adam=(0.5, 0.999), density=0.1, **SPARSE), sgd(model))
    parameter = (model[1].bias, model[1].weight)[layer]
    hook = parameter.register_hook(lambda g: g + (1e25 if hvd.rank() == 1 else 0))
    train(model, optimizer, [0])
    hook.remove()
    train(model, optimizer, range(1, 4))
    assert flat(model).abs().max() < 10
    assert_same_on_all_ranks(flat(model))


def test_adam_needs_averages():
    model = net()
    optimizer = wrap(model, DLSCompressor(adam=(0.5, 0.999), **SPARSE), sgd(model), op=hvd.Sum)
    with pytest.raises(DLSError, match=r"adam=\(0.5, 0.999\) with op=hvd.Sum.*use op=hvd.Average"):
        train(model, optimizer, [0])


def test_adam_must_see_all_gradients():
    def backward(sparse_as_dense):
        model = nn.ModuleList([nn.Embedding(50, 40, sparse=True), nn.Linear(40, 30)])
        hvd.broadcast_parameters(model.state_dict(), root_rank=0)
        compression = DLSCompressor(adam=(0.5, 0.999), **SPARSE)
        optimizer = wrap(model, compression, sgd(model), sparse_as_dense=sparse_as_dense)
        model[1](model[0](torch.arange(5))).sum().backward()
        return model, optimizer, flat(model)

    model, optimizer, before = backward(sparse_as_dense=False)
    with pytest.raises(DLSError, match=r"parameter of shape \(50, 40\) is sparse.*sparse=False"):
        optimizer.step()
    assert torch.equal(flat(model), before)
    model, optimizer, before = backward(sparse_as_dense=True)
    optimizer.step()
    assert not torch.equal(flat(model), before)
    assert_same_on_all_ranks(flat(model))

    model = net()
    some = list(model.named_parameters())[:2]
    optimizer = wrap(model, DLSCompressor(some, adam=(0.5, 0.999), **SPARSE), sgd(model))
    with pytest.raises(DLSError, match="parameters, of which DLSCompressor was given 2"):
        train(model, optimizer, [0])
