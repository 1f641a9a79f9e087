"""exchange="sparse_allreduce": owners add up, and hand the largest sums out."""

import tempfile
from pathlib import Path

import horovod.torch as hvd
import pytest
import torch
from torch import nn

from hvd_dls.core.wire.dealing import places_of
from hvd_dls.errors import DLSError, NonFiniteGradientError
from hvd_dls.torch import DLSCompressor, load_checkpoint, save_checkpoint
from tests.torch.with_ranks.training import (
    SPARSE,
    assert_same_on_all_ranks,
    flat,
    linear_loss,
    net,
    net_without_vectors,
    train,
    whole_numbers,
    wrap,
)

OWNERS = {"exchange": "sparse_allreduce", **SPARSE}


def pending(compressor, name, shape):
    """What this rank holds of a layer: its own residual, and what it has kept as an owner."""
    (state,) = compressor.state_dict()["models"]
    held = state["residuals"][name].float().clone()
    for key, array in state["kept"].items():
        layer, piece = key.rsplit("@", 1)
        if layer == name:
            held[places_of(len(held), piece)] += array.float()
    return held.reshape(shape)


@pytest.mark.parametrize("values", ["float32", "float16"])
def test_all_that_was_accumulated_is_applied_or_waits_on_some_rank(values):
    shapes = [(40, 30), (7, 5, 3, 3), (300, 2)]
    model = nn.ParameterList([nn.Parameter(torch.zeros(shape)) for shape in shapes])
    options = OWNERS | {"bucket_bytes": 6000, "values": values}  # three buckets
    compressor = DLSCompressor(model.named_parameters(), density=0.1, **options)
    optimizer = wrap(model, compressor, torch.optim.SGD(model.parameters(), lr=1), op=hvd.Sum)
    came, accumulated = ([torch.zeros(shape) for shape in shapes] for _ in range(2))
    for step in range(8):
        optimizer.zero_grad()
        sum(linear_loss(p, whole_numbers(p.shape, step)) for p in model).backward()
        optimizer.synchronize()
        for i, parameter in enumerate(model):
            came[i] += parameter.grad
            for rank in range(hvd.size()):
                accumulated[i] += whole_numbers(parameter.shape, step, rank)
        with optimizer.skip_synchronize():
            optimizer.step()
    for i, shape in enumerate(shapes):
        held = hvd.allreduce(pending(compressor, str(i), shape), op=hvd.Sum, name=f"held.{i}")
        assert held.abs().sum() > 0
        assert torch.equal(came[i] + held, accumulated[i])
    record = compressor.last_step()
    assert sum(int((p.grad != 0).sum()) for p in model) <= record.k.sum()


def test_parameters_and_ratios_agree_to_the_bit_and_the_state_goes_on(tmp_path):
    model = net_without_vectors()
    compressor = DLSCompressor(density=0.05, momentum=0.9, **OWNERS)
    optimizer = wrap(model, compressor, torch.optim.SGD(model.parameters(), lr=0.05))
    train(model, optimizer, range(12))
    assert compressor.stats().all.repeated > 0
    assert_same_on_all_ranks(flat(model))
    assert_same_on_all_ranks(torch.tensor(compressor.last_step().k.tolist()))
    weights, state = [p.detach().clone() for p in model.parameters()], compressor.state_dict()
    torch.save(state, tmp_path / "state")
    train(model, optimizer, range(12, 16))
    there = flat(model)
    again = net_without_vectors()
    for parameter, saved in zip(again.parameters(), weights, strict=True):
        parameter.data.copy_(saved)
    restarted = DLSCompressor(density=0.05, momentum=0.9, **OWNERS)
    optimizer = wrap(again, restarted, torch.optim.SGD(again.parameters(), lr=0.05))
    restarted.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    train(again, optimizer, range(12, 16))
    assert torch.equal(flat(again), there)


def test_at_density_one_training_equals_dense_training():
    trained = []
    for compression in (hvd.Compression.none, DLSCompressor(density=1, **OWNERS)):
        torch.manual_seed(3)
        model = net()
        train(model, wrap(model, compression), range(4))
        trained.append(flat(model))
    assert torch.allclose(*trained, rtol=1e-4, atol=1e-6)


def test_a_gradient_that_is_not_finite_refuses_the_step_on_all_ranks():
    model = net()
    compressor = DLSCompressor(density=0.05, **OWNERS)
    optimizer = wrap(model, compressor)
    train(model, optimizer, range(2))
    before = flat(model)
    for parameter in ("0.weight", "1.bias"):  # one that owners hear of, and one that goes dense
        optimizer.zero_grad()
        loss = model(torch.ones(6, 3, 4, 4)).sum()
        if hvd.rank() == hvd.size() - 1:
            loss = loss + torch.inf * dict(model.named_parameters())[parameter].sum()
        loss.backward()
        with pytest.raises(
            NonFiniteGradientError, match=f"'{parameter}' on rank {hvd.size() - 1};"
        ):
            optimizer.step()
        assert torch.equal(flat(model), before)
    train(model, optimizer, range(2, 4))
    assert_same_on_all_ranks(flat(model))


def test_a_step_that_one_rank_gives_up_is_given_up_by_all():
    model = net_without_vectors()
    compressor = DLSCompressor(density=0.05, bucket_bytes=3000, **OWNERS)
    optimizer = wrap(model, compressor)
    train(model, optimizer, range(3))
    before = flat(model)
    optimizer.zero_grad()
    loss = linear_loss(list(model.parameters())[-1], torch.ones(5, 30))
    if hvd.rank() == 0:
        loss.backward()
        compressor.abandon_step()
    else:
        for parameter in model.parameters():
            loss = loss + parameter.sum()
        loss.backward()
        with pytest.raises(DLSError, match=r"rank\(s\) \[0\] gave step 4 up"):
            optimizer.step()
    assert torch.equal(flat(model), before)
    train(model, optimizer, range(3, 6))
    assert_same_on_all_ranks(flat(model))


def test_a_checkpoint_holds_all_that_waits_and_training_goes_on():
    folder = Path(hvd.broadcast_object(tempfile.mkdtemp(), name="folder"))
    model, again = net_without_vectors(), net_without_vectors()
    compressor, loaded = (DLSCompressor(density=0.05, **OWNERS) for _ in range(2))
    train(model, wrap(model, compressor), range(4))
    save_checkpoint(folder, model.state_dict(), compressor)
    again.load_state_dict(load_checkpoint(folder, loaded))
    optimizer = wrap(again, loaded)
    (state,) = loaded.state_dict()["models"]
    for name, shape in state["parameters"]:
        waits = pending(compressor, name, shape)
        assert waits.any()
        assert torch.equal(torch.as_tensor(state["residuals"][name]).reshape(shape), waits)
    train(again, optimizer, range(4, 7))
    assert loaded.last_step().step == 7
    assert_same_on_all_ranks(flat(again))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"strategy": "global"}, "strategy='global'"),
        ({"exchange": "alltoall"}, "exchange='alltoall'"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_in_words(options, words):
    with pytest.raises(DLSError, match=words):
        DLSCompressor(**OWNERS | options)
