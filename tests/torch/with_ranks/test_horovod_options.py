"""Everything Horovod's optimizer offers, and every kind of parameter, with the compressor in it."""

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
    net_without_vectors,
    train,
    whole_numbers,
    wrap,
)


def compressor(**options):
    return DLSCompressor(density=0.05, **SPARSE, **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_gradient_types(dtype):
    try:
        torch.ones(1, 1, dtype=dtype) @ torch.ones(1, 1, dtype=dtype)
    except RuntimeError as problem:  # torch 2.1 multiplies no float16 on a CPU
        pytest.skip(str(problem))
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 5)).to(dtype)
    compression = compressor()
    train(model, wrap(model, compression), range(6))
    assert all(p.grad.dtype == dtype for p in model.parameters())
    assert torch.isfinite(flat(model)).all()
    assert compression.last_step().step == 6
    assert_same_on_all_ranks(flat(model))


def test_backward_passes_per_step():
    model = net()
    compression = compressor()
    optimizer = wrap(model, compression, backward_passes_per_step=3)
    train(model, optimizer, range(5), backward_passes=3)
    assert compression.last_step().step == 5
    assert_same_on_all_ranks(flat(model))


@pytest.mark.parametrize("groups", [2, "lists"])
def test_groups_give_the_same_as_no_groups(groups):
    trained = []
    for grouped in (False, True):
        torch.manual_seed(1)
        model = net_without_vectors()
        parameters = list(model.parameters())
        lists = [parameters[:2]] if groups == "lists" else groups
        compression = compressor(named_parameters=model.named_parameters())
        train(model, wrap(model, compression, groups=lists if grouped else None), range(6))
        trained.append(flat(model))
        assert_same_on_all_ranks(trained[-1])
    assert torch.equal(*trained)


def test_groups_of_dense_and_compressed_tensors_and_types():
    class Double(nn.Module):
        def forward(self, values):
            return values.double()

    wide = nn.Linear(32, 5, dtype=torch.float64)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 32), nn.ReLU(), Double(), wide)
    compression = compressor()
    train(model, wrap(model, compression, groups=2), range(5))
    assert compression.last_step().step == 5
    assert_same_on_all_ranks(flat(model))


class Branching(nn.Module):
    """Uses one of two branches, in another order on every rank."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(48, 40), nn.Linear(48, 40)
        self.never = nn.Linear(48, 40)
        self.out = nn.Linear(40, 5)
        self.frozen = nn.Linear(40, 40).requires_grad_(False)
        self.step = 0

    def forward(self, images):
        self.step += 1
        flattened = images.flatten(1)
        use_left = (self.step + hvd.rank()) % 2
        branch = self.left if use_left else self.right
        return self.out(self.frozen(branch(flattened)))


def test_parameters_that_take_no_part_on_some_ranks_or_none_or_are_frozen():
    model = Branching()
    frozen = model.frozen.weight.clone()
    compression = compressor()
    train(model, wrap(model, compression), range(8))
    assert "never.weight" in compression.last_step().names
    assert "frozen.weight" not in compression.last_step().names
    assert torch.equal(model.frozen.weight, frozen)
    assert_same_on_all_ranks(flat(model))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_both_ways(set_to_none):
    model = net()
    compression = compressor()
    optimizer = wrap(model, compression)
    for step in range(5):
        model.zero_grad(set_to_none=set_to_none)
        images, labels = batch(step)
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    assert compression.last_step().step == 5
    assert_same_on_all_ranks(flat(model))


@pytest.mark.parametrize("shared", [True, False], ids=["one instance", "two instances"])
def test_several_optimizers_in_one_process(shared):
    models = [net(), net()]
    first = compressor()
    compressions = [first, first if shared else compressor()]
    optimizers = [wrap(m, c) for m, c in zip(models, compressions, strict=True)]
    for step in range(6):
        for model, optimizer in zip(models, optimizers, strict=True):
            train(model, optimizer, [step])
    states = [model for c in set(compressions) for model in c.state_dict()["models"]]
    assert [state["step"] for state in states] == [6, 6]
    assert not torch.equal(flat(models[0]), flat(models[1]))
    for model in models:
        assert_same_on_all_ranks(flat(model))


def test_gradients_that_are_not_contiguous():
    """A parameter stored column by column has a gradient stored so, which Horovod refuses."""
    trained = []
    for density in (1, 0.1):
        torch.manual_seed(1)
        columns = nn.Parameter(torch.randn(30, 48).t())
        vector = nn.Parameter(torch.randn(2, 6).t()[0])
        model = nn.ParameterList([columns, vector])
        compression = DLSCompressor(density=density, **SPARSE)
        optimizer = wrap(model, compression, torch.optim.SGD(model.parameters(), lr=1))
        for step in range(4):
            optimizer.zero_grad()
            linear_loss(columns, whole_numbers(columns.shape, step)).backward()
            assert not columns.grad.is_contiguous()
            optimizer.step()
        trained.append(flat(model))
        assert_same_on_all_ranks(trained[-1])
    torch.manual_seed(1)
    expected = torch.randn(30, 48).t().double()
    for step in range(4):
        for rank in range(hvd.size()):
            expected = expected - whole_numbers((48, 30), step, rank).double() / hvd.size()
    torch.testing.assert_close(trained[0][: 48 * 30], expected.reshape(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sparse_as_dense", [False, True])
def test_sparse_gradients_of_embeddings_keep_horovods_path(sparse_as_dense):
    embedding = nn.Embedding(50, 16, sparse=True)
    model = nn.Sequential(embedding, nn.Flatten(), nn.Linear(16 * 3, 40), nn.Linear(40, 5))
    compression = compressor()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    optimizer = wrap(model, compression, optimizer, sparse_as_dense=sparse_as_dense)
    for step in range(5):
        optimizer.zero_grad()
        words = torch.randint(0, 50, (4, 3), generator=torch.Generator().manual_seed(step))
        nn.functional.cross_entropy(model(words), torch.tensor([0, 1, 2, 3])).backward()
        optimizer.step()
    k = dict(zip(compression.last_step().names, compression.last_step().k.tolist(), strict=True))
    assert list(k) == ["0.weight", "2.weight", "3.weight"]
    assert (compression._bindings[0].session.missed == {"0.weight"}) == (not sparse_as_dense)
    assert_same_on_all_ranks(flat(model))


def test_synchronize_by_hand_for_gradient_clipping():
    model = net()
    compression = compressor()
    optimizer = wrap(model, compression)
    for step in range(5):
        optimizer.zero_grad()
        images, labels = batch(step)
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.synchronize()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        with optimizer.skip_synchronize():
            optimizer.step()
    assert compression.last_step().step == 5
    assert_same_on_all_ranks(flat(model))


@pytest.mark.parametrize("explicit", [False, True])
def test_optimizer_state_broadcast_when_only_rank_0_resumes(explicit):
    """Horovod then takes a pretend step on the other ranks only, which must bind nothing."""
    model = net()
    compression = DLSCompressor(
        model.named_parameters() if explicit else None, density=0.05, **SPARSE
    )
    inner = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    if hvd.rank() == 0:
        model(batch(0)[0]).sum().backward()
        inner.step()
    optimizer = wrap(model, compression, inner)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    train(model, optimizer, range(5))
    assert_same_on_all_ranks(flat(model))


def test_a_gradient_of_no_known_parameter_goes_dense_and_is_said_once(caplog):
    model = net()
    compression = DLSCompressor(list(model.named_parameters())[:4], density=0.05, **SPARSE)
    with caplog.at_level(logging.WARNING, logger="hvd_dls"):
        train(model, wrap(model, compression), range(4))
    assert len([r for r in caplog.records if "no known parameter" in r.message]) == 1
    assert compression.last_step().names == ("0.weight",)
    assert_same_on_all_ranks(flat(model))


def test_tied_weights_are_one_parameter():
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 48), nn.Linear(48, 48), nn.Linear(48, 5))
    model[2].weight = model[1].weight
    compression = compressor()
    train(model, wrap(model, compression), range(5))
    assert compression.last_step().names == ("1.weight", "3.weight")
    assert_same_on_all_ranks(flat(model))


@pytest.mark.skipif("hvd.size() < 4", reason="needs two process sets of two ranks")
def test_process_sets():
    halves = [hvd.add_process_set([0, 1]), hvd.add_process_set([2, 3])]
    mine = halves[hvd.rank() // 2]
    for explicit in (False, True):
        model = net()
        named = model.named_parameters() if explicit else None
        options = {"process_set": mine} if explicit else {}
        compression = DLSCompressor(named, density=0.05, **SPARSE, **options)
        train(model, wrap(model, compression, process_set=mine), range(5))
        everyone = hvd.allgather(flat(model)[None], name=f"sets.{explicit}")
        assert torch.equal(everyone[0], everyone[1])
        assert torch.equal(everyone[2], everyone[3])
        assert not torch.equal(everyone[0], everyone[2])
    for process_set in halves:
        hvd.remove_process_set(process_set)
