"""Parameters of every kind: empty, of another type than at first, with two names."""

import copy

import horovod.torch as hvd
import pytest
import torch
from torch import nn

from hvd_dls.torch import DLSCompressor
from tests.torch.with_ranks.training import (
    SPARSE,
    assert_same_on_all_ranks,
    flat,
    linear_loss,
    net_without_vectors,
    train,
    whole_numbers,
    wrap,
)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0,)], ids=str)
@pytest.mark.parametrize("named", [True, False], ids=["named", "bare"])
def test_empty_parameters(shape, named):
    trained = []
    for extra in ([], [torch.zeros(shape)]):
        model = nn.ParameterList([torch.zeros(40, 30), *extra, torch.zeros(50, 30)])
        given = model.named_parameters() if named else None
        compression = DLSCompressor(given, density=0.05, **SPARSE)
        optimizer = wrap(model, compression, torch.optim.SGD(model.parameters(), lr=1))
        for step in range(4):
            optimizer.zero_grad()
            sum(linear_loss(p, whole_numbers(p.shape, step)) for p in model).backward()
            optimizer.step()
        assert compression.last_step().step == 4
        trained.append(flat(model))
        assert_same_on_all_ranks(trained[-1])
    assert torch.equal(*trained)


def test_a_model_of_which_only_an_empty_parameter_is_given():
    model = nn.ParameterList([torch.zeros(0, 5), torch.zeros(50, 30)])
    compression = DLSCompressor(list(model.named_parameters())[:1], density=0.05, **SPARSE)
    optimizer = wrap(model, compression, torch.optim.SGD(model.parameters(), lr=1))
    linear_loss(model[1], whole_numbers((50, 30), 0)).backward()
    optimizer.step()
    assert_same_on_all_ranks(flat(model))


@pytest.mark.parametrize("named", [True, False], ids=["named", "bare"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_model_that_gets_another_type_before_the_first_step(named, momentum):
    trained = []
    for late in (False, True):
        torch.manual_seed(1)
        model = net_without_vectors()
        if not late:
            model.double()
        given = model.named_parameters() if named else None
        compression = DLSCompressor(given, density=0.05, momentum=momentum, **SPARSE)
        optimizer = wrap(model, compression, torch.optim.SGD(model.parameters(), lr=0.05))
        if late:
            model.double()
        train(model, optimizer, range(4))
        assert compression.last_step().step == 4
        (state,) = compression.state_dict()["models"]
        assert {r.dtype for r in state["residuals"].values()} == {torch.float64}
        trained.append(flat(model))
        assert_same_on_all_ranks(trained[-1])
    assert torch.equal(*trained)


@pytest.mark.parametrize("kinds", [("float", "double"), ("double", "float"), ("float", "bfloat16")])
def test_a_model_that_gets_another_type_in_mid_training_loses_nothing(kinds):
    """Whole numbers up to 256, so that every type holds them; what waits is carried over."""
    model = nn.ParameterList([torch.zeros(40, 30), torch.zeros(50, 30)])
    getattr(model, kinds[0])()
    compression = DLSCompressor(model.named_parameters(), density=0.1, **SPARSE)
    optimizer = wrap(model, compression, torch.optim.SGD(model.parameters(), lr=1), op=hvd.Sum)
    accumulated = [torch.zeros(p.shape) for p in model]
    for step in range(6):
        if step == 3:
            waiting = copy.deepcopy(compression.state_dict()["models"][0]["residuals"])
            getattr(model, kinds[1])()
        optimizer.zero_grad()
        sum(linear_loss(p, whole_numbers(p.shape, step, largest=3)) for p in model).backward()
        optimizer.step()
        assert compression.last_step().step == step + 1
        for total, parameter in zip(accumulated, model, strict=True):
            for rank in range(hvd.size()):
                total += whole_numbers(parameter.shape, step, rank, largest=3)
    assert all(residual.any() for residual in waiting.values())
    (state,) = compression.state_dict()["models"]
    for i, (total, parameter) in enumerate(zip(accumulated, model, strict=True)):
        kept = hvd.allreduce(state["residuals"][str(i)].float(), op=hvd.Sum, name=f"kept.{i}")
        assert torch.equal(kept.reshape(parameter.shape) - parameter.detach().float(), total)
    assert_same_on_all_ranks(flat(model))


def test_a_parameter_under_two_names_is_one_layer():
    trained = []
    for twice in (False, True):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Flatten(), *(nn.Linear(48, n, bias=False) for n in (48, 48, 5)))
        model[2].weight = model[1].weight
        named = list(model.named_parameters(remove_duplicate=not twice))
        assert len(named) == 2 + twice
        compression = DLSCompressor(named, density=0.05, **SPARSE)
        optimizer = hvd.DistributedOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.05),
            named_parameters=named,
            compression=compression,
        )
        train(model, optimizer, range(4))
        assert len(compression.last_step().names) == 2
        (state,) = compression.state_dict()["models"]
        assert len(state["residuals"]) == 2
        trained.append(flat(model))
        assert_same_on_all_ranks(trained[-1])
    assert torch.equal(*trained)
