"""The optimizer is known at its first gradient: every option holds from the first step on."""

import io

import horovod.torch as hvd
import pytest
import torch
from torch import nn

from hvd_dls import NonFiniteGradientError
from hvd_dls.torch import DLSCompressor
from tests.torch.with_ranks.test_training_options import poisoned
from tests.torch.with_ranks.training import (
    SPARSE,
    assert_same_on_all_ranks,
    batch,
    flat,
    net,
    net_without_vectors,
    train,
    wrap,
)


def wide():
    """Large enough for the options of the bare class."""
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 300), nn.ReLU(), nn.Linear(300, 5))


def sgd(model, momentum=0.0):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=momentum)


def backward(model, step):
    images, labels = batch(step)
    nn.functional.cross_entropy(model(images), labels).backward()


OPTIONS = [
    {},
    {"clip_norm": 0.1},
    {"clip_value": 0.01},
    {"momentum": 0.9},
    {"dense_steps": 1, "warmup_steps": 4},
    {"prior": "measured"},
    {"strategy": "global"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_without_named_parameters_every_step_is_the_same_as_with_them(options):
    trained = []
    for bare in (False, True):
        torch.manual_seed(1)
        model = net_without_vectors()
        named = None if bare else model.named_parameters()
        compression = DLSCompressor(named, density=0.05, **SPARSE, **options)
        optimizer = wrap(model, compression, sgd(model))
        weights = []
        for step in range(3):
            train(model, optimizer, [step])
            assert compression.last_step().step == step + 1
            weights.append(flat(model))
        trained.append(torch.stack(weights))
        assert_same_on_all_ranks(trained[-1].view(-1))
    assert torch.equal(*trained)


def test_the_bare_class_is_sparse_from_the_first_step_on():
    model = wide()
    train(model, wrap(model, DLSCompressor), range(1))
    record = DLSCompressor.last_step()
    assert record.step == 1
    assert record.names == ("1.weight", "3.weight")
    assert record.k.sum() == round(0.01 * record.sizes.sum())
    assert_same_on_all_ranks(flat(model))


def test_horovod_s_optimizer_needs_no_names_either():
    model = net_without_vectors()
    compression = DLSCompressor(density=0.05, **SPARSE)
    optimizer = hvd.DistributedOptimizer(sgd(model), compression=compression)
    train(model, optimizer, range(3))
    assert compression.last_step().step == 3
    assert_same_on_all_ranks(flat(model))


# Updates that are not optimizer.step() ----------------------------------------------------------


@pytest.mark.parametrize("use", ["class", "instance"])
@pytest.mark.parametrize("update", ["inner optimizer", "by hand"])
def test_synchronize_and_an_update_elsewhere(use, update):
    """As SAM, Lookahead and gradient surgery do: Horovod's step is never called."""
    model = wide()
    compression = DLSCompressor if use == "class" else DLSCompressor(density=0.05, **SPARSE)
    inner, optimizer = sgd(model), wrap(model, compression, sgd(model))
    before = flat(model)
    for step in range(4):
        model.zero_grad()
        backward(model, step)
        optimizer.synchronize()
        if update == "inner optimizer":
            inner.step()
        else:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.05 * parameter.grad
        record = compression.last_step()
        assert record.step == step + 1
        assert record.sparse_bytes > 0
        assert record.k.sum() < 0.1 * record.sizes.sum()
    assert_same_on_all_ranks(flat(model))
    assert not torch.equal(before, flat(model))


@pytest.mark.parametrize("bare", [True, False], ids=["bare", "named"])
@pytest.mark.parametrize("first", [True, False], ids=["first step", "third step"])
def test_a_skipped_step_leaves_zeros_where_nobody_asked_for_inf(bare, first):
    model = net()
    named = None if bare else model.named_parameters()
    compression = DLSCompressor(named, density=0.1, nonfinite="skip", **SPARSE)
    inner, optimizer = sgd(model), wrap(model, compression, sgd(model))

    def update(step, images_times=1.0):
        model.zero_grad()
        images, labels = batch(step)
        nn.functional.cross_entropy(model(images * images_times), labels).backward()
        optimizer.synchronize()

    for step in range(0 if first else 2):
        update(step)
        inner.step()
    before = flat(model)
    update(2, float("inf") if hvd.rank() == hvd.size() - 1 else 1.0)
    assert all(not parameter.grad.any() for parameter in model.parameters())
    inner.step()
    assert torch.equal(flat(model), before)
    assert compression.skipped_steps() == 1
    update(3)
    inner.step()
    assert not torch.equal(flat(model), before)
    assert flat(model).isfinite().all()
    assert_same_on_all_ranks(flat(model))


@pytest.mark.parametrize("bare", [True, False], ids=["bare", "named"])
def test_a_skipped_first_step_changes_nothing(bare):
    model = net()
    named = None if bare else model.named_parameters()
    compression = DLSCompressor(named, density=0.1, nonfinite="skip", **SPARSE)
    inner = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1)
    optimizer = wrap(model, compression, inner)
    before = flat(model)
    poisoned(model, optimizer, 0, "3.weight", float("inf"))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(flat(model), before)
    assert not optimizer.state
    assert compression.skipped_steps() == 1
    poisoned(model, optimizer, 1, "")
    assert compression.last_step().step == 1
    assert not torch.equal(flat(model), before)
    assert_same_on_all_ranks(flat(model))


@pytest.mark.parametrize(
    ("make", "where"),
    [(wide, "1.weight"), (wide, "3.bias"), (lambda: nn.Linear(4, 2), "weight")],
    ids=["compressed", "dense", "in a model of which nothing is compressed"],
)
@pytest.mark.parametrize("step", [0, 2], ids=["first step", "third step"])
def test_the_bare_class_raises_for_nan_in_any_step(make, where, step):
    model = make()
    optimizer = wrap(model, DLSCompressor)
    for good in range(step):
        poisoned(model, optimizer, good, "")
    before = flat(model)
    with pytest.raises(NonFiniteGradientError) as error:
        poisoned(model, optimizer, step, where)
    assert f"'{where}'" in str(error.value)
    assert torch.equal(flat(model), before)
    poisoned(model, optimizer, step, "")
    assert flat(model).isfinite().all()
    assert_same_on_all_ranks(flat(model))


# Going on from a checkpoint ---------------------------------------------------------------------


@pytest.mark.parametrize("use", ["class", "instance"])
@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "warmup_steps": 9}], ids=str)
def test_a_training_that_was_resumed_is_one_that_was_never_stopped(use, options):
    def begin():
        torch.manual_seed(1)
        model = net_without_vectors()
        compression = DLSCompressor(density=0.05, **SPARSE, **options)
        if use == "class":
            DLSCompressor._default_instance, compression = compression, DLSCompressor
        return model, wrap(model, compression, sgd(model)), compression

    model, optimizer, compression = begin()
    train(model, optimizer, range(4))
    file = io.BytesIO()
    torch.save([x.state_dict() for x in (model, optimizer, compression)], file)
    train(model, optimizer, range(4, 8))
    file.seek(0)
    again = begin()
    for part, state in zip(again, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    train(*again[:2], range(4, 8))
    assert again[2].last_step().step == 8
    assert torch.equal(flat(model), flat(again[0]))
    assert_same_on_all_ranks(flat(model))
