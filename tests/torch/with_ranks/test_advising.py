"""``hvd_dls.torch.advise``: what it leaves as it was, and what all ranks refuse."""

from __future__ import annotations

import copy

import horovod.torch as hvd
import pytest
import torch
from torch import nn

from hvd_dls.errors import DLSError, RanksDisagreeError
from hvd_dls.torch import advise
from tests.torch.with_ranks.training import batch, net

QUICK = {"seconds": 0.1, "turns": 2, "densities": (0.1,), "quiet": True}


def loss_of(model):
    images, labels = batch(0)
    return nn.functional.cross_entropy(model(images), labels)


def test_a_script_is_advised_and_its_model_left_alone():
    model = net()
    before = copy.deepcopy(model.state_dict())
    advice = advise(
        model, loss_of, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1), **QUICK
    )
    assert [row.candidate.name for row in advice.rows] == ["dense", "fp16", "dls:0.1"]
    assert advice.ranks == hvd.size()
    recommended = hvd.allgather_object(advice.recommended.name)
    assert len(set(recommended)) == 1, recommended
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(parameter.grad is None for parameter in model.parameters())


def test_models_that_differ_are_refused_on_all_ranks():
    model = nn.Linear(48, 40 + (hvd.rank() == hvd.size() - 1))
    with pytest.raises(RanksDisagreeError, match=f"rank {hvd.size() - 1} has parameter 0"):
        advise(model, lambda model: model(torch.randn(2, 48)).sum(), **QUICK)


def test_plans_that_differ_are_refused_on_all_ranks():
    plan = QUICK | {"turns": 2 + hvd.rank()}
    with pytest.raises(RanksDisagreeError, match="rank 1 has the plan"):
        advise(net(), loss_of, **plan)


def test_a_step_that_fails_on_one_rank_is_refused_on_all():
    def fails(model):
        if hvd.rank() == 1:
            raise KeyError("labels")
        return loss_of(model)

    with pytest.raises(DLSError, match="rank 1: KeyError: 'labels'"):
        advise(net(), fails, **QUICK)
    with pytest.raises(DLSError, match="returned NoneType: accepted is the loss"):
        advise(net(), lambda model: None, **QUICK)
    other = net()
    with pytest.raises(DLSError, match="of this model, a copy"):
        advise(net(), lambda model: loss_of(other), **QUICK)


@pytest.mark.parametrize(
    ("options", "named"),
    [({"turn": 3}, "unknown option 'turn': accepted are"), ({"densities": (2.0,)}, "density=2.0")],
)
def test_options_that_are_not_accepted_are_refused(options, named):
    with pytest.raises(DLSError, match=named):
        advise(net(), loss_of, **{**QUICK, **options})


def test_a_model_with_nothing_to_train_is_refused():
    with pytest.raises(DLSError, match="no parameter that is trained"):
        advise(nn.ReLU(), loss_of, **QUICK)
