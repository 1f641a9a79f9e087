"""Frozen layers are untouched; layers that stay away leave their share to the others."""

import logging

import horovod.torch as hvd
import pytest
import torch
from torch import nn

from hvd_dls.torch import DLSCompressor
from tests.torch.with_ranks.training import (
    SPARSE,
    assert_same_on_all_ranks,
    batch,
    flat,
    linear_loss,
    net,
    whole_numbers,
    wrap,
)

PATIENCE = 10  # steps in a row after which a layer's share is given away


def k_of(compression):
    record = compression.last_step()
    return dict(zip(record.names, record.k.tolist(), strict=True))


def residual_of(compression, name):
    """A copy; nothing, of a layer that goes dense."""
    found = compression.state_dict()["models"][0]["residuals"].get(name, torch.zeros(0))
    return found.clone()


ZEROED = {
    "zero_grad of the optimizer": lambda model, optimizer: optimizer.zero_grad(),
    "set_to_none=False": lambda model, optimizer: model.zero_grad(set_to_none=False),
    "of what needs a gradient only": lambda model, optimizer: [
        setattr(p, "grad", None) for p in model.parameters() if p.requires_grad
    ],
}


@pytest.mark.parametrize("zero", ZEROED.values(), ids=ZEROED)
@pytest.mark.parametrize("own", [0.0, 0.9], ids=["optimizer's momentum", "our momentum"])
@pytest.mark.parametrize("name", ["6.weight", "6.bias"], ids=["compressed", "dense"])
def test_a_layer_that_is_frozen_in_mid_training_is_untouched(name, own, zero):
    model = net()
    compression = DLSCompressor(model.named_parameters(), density=0.05, momentum=own, **SPARSE)
    inner = torch.optim.SGD(
        model.parameters(), lr=0.05, momentum=0 if own else 0.9, weight_decay=0.1
    )
    optimizer = wrap(model, compression, inner)
    layer = model.get_parameter(name)

    def steps(which):
        for step in which:
            zero(model, optimizer)
            images, labels = batch(step)
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()

    steps(range(4))
    layer.requires_grad_(False)
    frozen, left, others = layer.clone(), residual_of(compression, name), flat(model)
    assert left.any() == (name == "6.weight")
    steps(range(4, 4 + PATIENCE + 3))
    assert torch.equal(layer, frozen)
    assert torch.equal(residual_of(compression, name), left)
    assert not torch.equal(flat(model), others)
    layer.requires_grad_(True)
    steps(range(20, 26))
    assert not torch.equal(layer, frozen)
    assert left.numel() == 0 or not torch.equal(residual_of(compression, name), left)
    assert compression.last_step().step == 4 + PATIENCE + 3 + 6
    assert_same_on_all_ranks(flat(model))


def test_a_frozen_layer_s_gradient_is_zero_where_the_update_is_made_by_hand():
    model = net()
    compression = DLSCompressor(model.named_parameters(), density=0.05, **SPARSE)
    optimizer = wrap(model, compression)
    for step in range(6):
        if step == 3:
            model[6].weight.requires_grad_(False)
        optimizer.zero_grad()
        images, labels = batch(step)
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.synchronize()
        gradient = model[6].weight.grad
        assert (gradient is None or not gradient.any()) == (step >= 3)
        assert model[3].weight.grad.any()


def test_nothing_is_lost_over_freezing_and_thawing(caplog):
    """To the bit; k of the frozen layer is 0 after a while, and more again when it is back."""
    shapes = {"0": (40, 30), "1": (100, 30), "2": (300, 2)}
    model = nn.ParameterList([torch.zeros(shape) for shape in shapes.values()])
    compression = DLSCompressor(model.named_parameters(), density=0.05, **SPARSE)
    sgd = torch.optim.SGD(model.parameters(), lr=1)
    optimizer = wrap(model, compression, sgd, op=hvd.Sum)
    accumulated = {name: torch.zeros(shape) for name, shape in shapes.items()}
    budget, sent = 240, []
    with caplog.at_level(logging.DEBUG, logger="hvd_dls"):
        for step in range(PATIENCE + 14):
            model[1].requires_grad_(not 4 <= step < PATIENCE + 8)
            optimizer.zero_grad()
            taking_part = {n: p for n, p in model.named_parameters() if p.requires_grad}
            for name, parameter in taking_part.items():
                linear_loss(parameter, whole_numbers(parameter.shape, step)).backward()
                for rank in range(hvd.size()):
                    accumulated[name] += whole_numbers(parameter.shape, step, rank)
            optimizer.step()
            sent.append(k_of(compression).get("1", 0))
            assert compression.last_step().k.sum() <= budget
            if step in (3, PATIENCE + 7, PATIENCE + 13):
                assert compression.last_step().k.sum() == budget
    assert sent[3] > 0
    assert sent[PATIENCE + 7] == 0
    assert sent[PATIENCE + 13] > 0
    for name, parameter in model.named_parameters():
        kept = hvd.allreduce(residual_of(compression, name), op=hvd.Sum, name=f"kept.{name}")
        assert torch.equal(kept.reshape(shapes[name]) - parameter.detach(), accumulated[name])
    assert_same_on_all_ranks(flat(model))


def told_of(caplog, name):
    return [r for r in caplog.records if r.name == "hvd_dls" and f"'{name}'" in r.getMessage()]


def test_layers_that_never_arrive_count_as_if_they_were_not_compressed(caplog, monkeypatch):
    """Sparse gradients of an embedding, which Horovod reduces itself; and overlap comes back."""
    embedding = nn.Embedding(500, 16, sparse=True)
    model = nn.Sequential(embedding, nn.Flatten(), nn.Linear(48, 40), nn.Linear(40, 5))
    compression = DLSCompressor(model.named_parameters(), density=0.05, **SPARSE)
    optimizer = wrap(model, compression, torch.optim.SGD(model.parameters(), lr=0.05))
    begun = []
    original = hvd.allgather_async
    monkeypatch.setattr(
        hvd, "allgather_async", lambda *args, **kwargs: begun.append(1) or original(*args, **kwargs)
    )
    in_backward = []
    with caplog.at_level(logging.INFO, logger="hvd_dls"):
        for step in range(3 * PATIENCE):
            optimizer.zero_grad()
            words = torch.randint(0, 500, (4, 3), generator=torch.Generator().manual_seed(step))
            loss = nn.functional.cross_entropy(model(words), torch.tensor([0, 1, 2, 3]))
            begun.clear()
            loss.backward()
            in_backward.append(len(begun))
            optimizer.step()
            if step == 0:
                before = compression.last_step()
    assert before.k.sum() == round(0.05 * (8000 + 1920 + 200))
    assert k_of(compression).get("0.weight", 0) == 0
    assert compression.last_step().k.sum() == round(0.05 * (1920 + 200))
    assert all(in_backward[PATIENCE + 1 :])
    assert len(told_of(caplog, "0.weight")) == (hvd.rank() == 0)
    assert_same_on_all_ranks(flat(model))


def test_a_layer_that_stays_away_on_some_ranks_only_keeps_its_share():
    model = nn.ParameterList([torch.zeros(40, 30), torch.zeros(50, 30)])
    compression = DLSCompressor(density=0.05, **SPARSE)
    optimizer = wrap(model, compression, torch.optim.SGD(model.parameters(), lr=1))
    for step in range(PATIENCE + 4):
        optimizer.zero_grad()
        used = list(model)[: 1 if hvd.rank() == 0 else 2]
        sum(linear_loss(p, whole_numbers(p.shape, step)) for p in used).backward()
        optimizer.step()
    assert k_of(compression)["1"] > 0
    assert flat(model)[1200:].any()
    assert_same_on_all_ranks(flat(model))
