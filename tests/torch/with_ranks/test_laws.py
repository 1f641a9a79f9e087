"""Agreement, conservation, and density 1 = dense: on unmodified Horovod, for every way of use."""

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
    net,
    train,
    whole_numbers,
    wrap,
)


def ratios(compressor):
    return torch.tensor(compressor.last_step().k.tolist())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"strategy": "layerwise"},
        {"prior": "weight_norm"},
        {"prior": "uniform", "tail": "laplace"},
        {"pair_steps": 2, "adjust_every": 3},
    ],
    ids=str,
)
def test_parameters_and_ratios_agree_to_the_bit(options):
    model = net()
    compressor = DLSCompressor(density=0.05, **SPARSE, **options)
    optimizer = wrap(model, compressor)
    before = flat(model)
    train(model, optimizer, range(12))
    assert not torch.equal(before, flat(model))
    assert compressor.last_step().step == 12
    assert_same_on_all_ranks(flat(model))
    assert_same_on_all_ranks(ratios(compressor))


def test_the_bare_class_agrees_and_is_sparse_from_the_first_step_on():
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 300), nn.ReLU(), nn.Linear(300, 5))
    optimizer = wrap(model, DLSCompressor)
    train(model, optimizer, range(1))
    assert DLSCompressor.last_step().sparse_bytes > 0
    train(model, optimizer, range(1, 8))
    record = DLSCompressor.last_step()
    assert record.step == 8
    assert record.names == ("1.weight", "3.weight")
    assert record.k.sum() == round(0.01 * record.sizes.sum())
    assert_same_on_all_ranks(flat(model))


def test_given_the_parameters_the_first_step_is_sparse():
    model = net()
    compressor = DLSCompressor(model.named_parameters(), density=0.05, **SPARSE)
    train(model, wrap(model, compressor), range(1))
    assert compressor.last_step().step == 1
    assert_same_on_all_ranks(flat(model))


def test_ratios_move_under_dls_and_stay_under_layerwise():
    seen = {}
    for strategy in ("dls", "layerwise"):
        model = net()
        compressor = DLSCompressor(
            model.named_parameters(), density=0.05, strategy=strategy, measure_every=1, **SPARSE
        )
        optimizer = wrap(model, compressor)
        train(model, optimizer, range(1))
        first = ratios(compressor)
        train(model, optimizer, range(1, 12))
        seen[strategy] = (first, ratios(compressor), compressor.last_step().quality.energy)
    assert not torch.equal(*seen["dls"][:2])
    assert torch.equal(*seen["layerwise"][:2])
    assert seen["dls"][2] > seen["layerwise"][2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_what_was_sent_and_the_residuals_are_all_that_was_accumulated(dtype):
    shapes = [(40, 30), (7, 5, 3, 3), (300, 2)]
    largest = 3  # sums stay below 256, up to which bfloat16 holds every whole number
    model = nn.ParameterList([nn.Parameter(torch.zeros(s, dtype=dtype)) for s in shapes])
    compressor = DLSCompressor(model.named_parameters(), density=0.1, **SPARSE)
    optimizer = wrap(model, compressor, torch.optim.SGD(model.parameters(), lr=1), op=hvd.Sum)
    received = [torch.zeros(s) for s in shapes]
    accumulated = [torch.zeros(s) for s in shapes]
    for step in range(6):
        optimizer.zero_grad()
        sum(linear_loss(p, whole_numbers(p.shape, step, largest=largest)) for p in model).backward()
        optimizer.synchronize()
        for i, parameter in enumerate(model):
            received[i] += parameter.grad.float()
            for rank in range(hvd.size()):
                accumulated[i] += whole_numbers(parameter.shape, step, rank, largest)
        with optimizer.skip_synchronize():
            optimizer.step()
    (state,) = compressor.state_dict()["models"]
    for i, shape in enumerate(shapes):
        kept = hvd.allreduce(state["residuals"][str(i)].float(), op=hvd.Sum, name=f"kept.{i}")
        assert kept.abs().sum() > 0
        assert torch.equal(received[i] + kept.reshape(shape), accumulated[i])


@pytest.mark.parametrize(
    "horovod_options",
    [{"op": hvd.Average}, {"op": hvd.Sum}, {"gradient_predivide_factor": 1.5}],
    ids=["average", "sum", "predivide"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_at_density_one_training_equals_dense_training(dtype, horovod_options):
    trained = []
    for compression in (hvd.Compression.none, DLSCompressor(density=1, **SPARSE)):
        torch.manual_seed(1)
        model = net().to(dtype)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        train(model, wrap(model, compression, optimizer, **horovod_options), range(8))
        trained.append(flat(model))
    assert_same_on_all_ranks(trained[1])
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(trained[1], trained[0], rtol=tolerance, atol=tolerance)


def test_at_density_one_the_cost_rule_makes_it_dense_training_itself():
    trained = []
    for compression in (hvd.Compression.none, DLSCompressor(density=1)):
        torch.manual_seed(1)
        model = net()
        train(model, wrap(model, compression), range(5))
        trained.append(flat(model))
    # Not to the bit: Horovod fuses tensors as they arrive, and adds them up accordingly.
    torch.testing.assert_close(*trained, rtol=1e-5, atol=1e-6)
    assert DLSCompressor.last_step() is None


def test_the_average_is_that_of_all_ranks_entries():
    model = nn.ParameterList([nn.Parameter(torch.zeros(64, 64))])
    compressor = DLSCompressor(model.named_parameters(), density=0.25, **SPARSE)
    optimizer = wrap(model, compressor, torch.optim.SGD(model.parameters(), lr=1))
    linear_loss(model[0], whole_numbers(model[0].shape, 0)).backward()
    optimizer.synchronize()
    expected = torch.zeros(64 * 64)
    for rank in range(hvd.size()):
        mine = whole_numbers((64 * 64,), 0, rank)
        order = torch.sort(mine.abs(), descending=True, stable=True).indices[: 64 * 64 // 4]
        expected[order] += mine[order]
    torch.testing.assert_close(model[0].grad.view(-1), expected / hvd.size())
