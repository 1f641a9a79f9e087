"""What is told through Python's logging: at the start, of skipped steps, of what goes wrong."""

import logging

import horovod.torch as hvd
import pytest
import torch
from torch import nn

from hvd_dls.torch import DLSCompressor
from tests.torch.with_ranks.test_training_options import poisoned
from tests.torch.with_ranks.training import SPARSE, net, train, wrap


@pytest.fixture
def told(caplog):
    """Messages of one level, or of all levels, so far."""
    caplog.set_level(logging.DEBUG, logger="hvd_dls")

    def of(level=None):
        ours = [record for record in caplog.records if record.name == "hvd_dls"]
        return [record.getMessage() for record in ours if level in (None, record.levelno)]

    return of


def on_rank_0(count):
    """All ranks know the same, and one of them says it."""
    return count if hvd.rank() == 0 else 0


@pytest.mark.parametrize("bare", [True, False], ids=["bare", "named"])
def test_one_line_at_the_start_says_what_will_happen(told, bare):
    model = net()
    named = None if bare else model.named_parameters()
    compression = DLSCompressor(named, density=0.05, **SPARSE)
    train(model, wrap(model, compression), range(4))
    lines = told(logging.INFO)
    assert len(lines) == on_rank_0(1)
    for line in lines:
        record = compression.last_step()
        assert f"{len(record.names)} of {len(list(model.parameters()))} layers" in line
        assert str(record.k.sum()) in line  # entries
        assert "B" in line  # bytes, in whatever unit
        assert "dense" in line
    assert told(logging.WARNING) == []


def test_layers_that_go_dense_are_told_with_the_reason_to_those_who_look_for_it(told):
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 100), nn.Linear(100, 100), nn.Linear(100, 5))
    compression = DLSCompressor(density=0.05, layer_density={"2.*": "dense"})
    train(model, wrap(model, compression), range(3))
    lines = told(logging.DEBUG)
    for name, reason in (("1.bias", ""), ("2.weight", "layer_density"), ("3.weight", "1024")):
        of_layer = [line for line in lines if f"'{name}'" in line]
        assert len(of_layer) == on_rank_0(1)
        assert all(reason in line for line in of_layer)
    assert not any("'1.weight'" in line for line in lines)


def test_skipped_steps_are_told_at_first_and_then_ever_more_seldom(told):
    model = net()
    compression = DLSCompressor(model.named_parameters(), density=0.1, nonfinite="skip", **SPARSE)
    optimizer = wrap(model, compression)
    seen = []
    for step in range(12):
        poisoned(model, optimizer, step, "3.weight")
        seen.append(len(told(logging.WARNING)))
    assert compression.skipped_steps() == 12
    assert seen == [on_rank_0(1)] * 9 + [on_rank_0(2)] * 3
    assert all("'3.weight'" in line for line in told(logging.WARNING))


def test_an_optimizer_that_nothing_passes_through_is_told(told):
    """Gradients that were set by hand: Horovod's hooks never see them."""
    model = net()
    optimizer = wrap(model, DLSCompressor(density=0.05, **SPARSE))
    for _ in range(100):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        with optimizer.skip_synchronize():
            optimizer.step()
    lines = told(logging.WARNING)
    assert 1 <= len(lines) <= 3
    assert all("nothing has been compressed" in line for line in lines)


def test_a_model_of_which_nothing_is_compressed_is_told(told):
    model = nn.Linear(48, 5)
    optimizer = wrap(model, DLSCompressor)
    for step in range(3):
        poisoned(model, optimizer, step, "")
    lines = told()
    assert any("nothing" in line and "dense" in line for line in lines) == (hvd.rank() == 0)
