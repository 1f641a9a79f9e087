"""``LocalSteps``: laws, types, buffers, state.  Refusals: test_local_steps_refusals.py."""

import copy

import horovod.torch as hvd
import pytest
import torch
from torch import nn

from hvd_dls import DLSError
from hvd_dls.torch import LocalSteps, load_checkpoint, save_checkpoint
from tests.torch.with_ranks.local_training import start, train
from tests.torch.with_ranks.training import (
    assert_same_on_all_ranks,
    batch,
    flat,
    net,
    net_without_vectors,
)


def average_of_ranks(tensor):
    return hvd.allgather(tensor[None], name="test.average").mean(0)


def test_ranks_differ_within_a_round_and_are_alike_after_it():
    model, optimizer, rounds = start(net())
    assert train(model, optimizer, rounds, range(6)) == [2, 5]
    assert_same_on_all_ranks(flat(model))
    assert_same_on_all_ranks(torch.cat([b.double().flatten() for b in model.buffers()]))
    assert train(model, optimizer, rounds, [6, 7]) == []
    everyone = hvd.allgather(flat(model)[None], name="within")
    assert not torch.equal(everyone[0], everyone[1])
    rounds.finish()
    assert_same_on_all_ranks(flat(model))
    assert train(model, optimizer, rounds, range(8, 11)) == [10]


def test_weights_follow_the_first_rank_when_it_is_made():
    model = net()
    expected = flat(model)
    if hvd.rank():
        with torch.no_grad():
            for tensor in [*model.parameters(), *model.buffers()]:
                tensor += 1
    LocalSteps(model)
    assert torch.equal(flat(model), expected)
    assert_same_on_all_ranks(torch.cat([b.double().flatten() for b in model.buffers()]))


def test_tensors_of_any_type_and_order_in_memory_follow_the_first_rank():
    model = net().to(memory_format=torch.channels_last)
    kinds = [torch.bool, torch.int16, torch.uint16, torch.complex64, torch.float8_e4m3fn]
    for kind in kinds:
        model.register_buffer(f"of_{kind}".replace(".", "_"), torch.tensor(hvd.rank()).to(kind))
    model.register_buffer("turned", torch.arange(6.0).view(2, 3).t() + hvd.rank())
    model.register_buffer("empty", torch.zeros(0))
    _, optimizer, rounds = start(model, optimizer=torch.optim.AdamW)
    for buffer in [*model.buffers(recurse=False)][: len(kinds)]:
        assert buffer.to(torch.complex64) == 0
    assert torch.equal(model.turned, torch.arange(6.0).view(2, 3).t())
    train(model, optimizer, rounds, range(3))
    assert_same_on_all_ranks(flat(model))


@pytest.mark.parametrize(("lr", "momentum"), [(1.0, 0.0), (0.7, 0.9)])
def test_at_density_one_it_is_the_dense_exchange(lr, momentum):
    """Beside the formula: SGD with Nesterov's momentum of the averaged change (DiLoCo)."""
    model, optimizer, rounds = start(lr=lr, momentum=momentum, density=1.0)
    alone = copy.deepcopy(model)
    own = torch.optim.Adam(alone.parameters(), lr=0.01)
    common, velocity = flat(alone), 0.0
    for round_ in range(3):
        train(model, optimizer, rounds, range(3 * round_, 3 * round_ + 3))
        for step in range(3 * round_, 3 * round_ + 3):
            own.zero_grad()
            images, labels = batch(step)
            nn.functional.cross_entropy(alone(images), labels).backward()
            own.step()
        change = average_of_ranks(common - flat(alone))
        velocity = momentum * velocity + change
        common = common - lr * (change + momentum * velocity)
        torch.testing.assert_close(flat(model), common, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            for parameter, part in zip(
                alone.parameters(),
                common.split([p.numel() for p in alone.parameters()]),
                strict=True,
            ):
                parameter.copy_(part.view_as(parameter))


def test_what_was_changed_is_applied_or_waits():
    """Conservation: with lr=1 common weights and the mean of residuals add up to all changes."""
    model, optimizer, rounds = start(every=1)
    begin = flat(model)
    changed = torch.zeros_like(begin)
    for step in range(5):
        before = flat(model)
        optimizer.zero_grad()
        images, labels = batch(step)
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        changed += before - flat(model)
        rounds.step()
    (state,) = rounds.compression.state_dict()["models"]
    waits = torch.cat(
        [state["residuals"][n].double().flatten() for n, _ in model.named_parameters()]
    )
    assert waits.any()
    torch.testing.assert_close(
        begin - flat(model) + average_of_ranks(waits), average_of_ranks(changed), rtol=0, atol=1e-6
    )


def test_half_precision_has_common_weights_in_float32():
    model = net_without_vectors().bfloat16()
    model, optimizer, rounds = start(model, every=2, density=1.0)
    start_of = flat(model)
    for step in range(4):
        optimizer.zero_grad()
        images, labels = batch(step, torch.bfloat16)
        nn.functional.cross_entropy(model(images).float(), labels).backward()
        optimizer.step()
        rounds.step()
    assert_same_on_all_ranks(flat(model))
    common = rounds.state_dict()["common"]
    assert all(tensor.dtype == torch.float32 for tensor in common.values())
    # A round in which nothing is changed changes nothing, though weights are rounded.
    before = {name: tensor.clone() for name, tensor in common.items()}
    rounds.finish()
    after = rounds.state_dict()["common"]
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not torch.equal(flat(model), start_of)


def test_a_compression_of_horovods_own():
    model, _, _ = start()
    rounds = LocalSteps(model, hvd.Compression.fp16, every=2, lr=0.7, momentum=0.9)
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), rounds, range(4))
    assert_same_on_all_ranks(flat(model))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_round_that_ends_where_gradients_are_off(mode):
    model, optimizer, rounds = start(net())
    train(model, optimizer, rounds, [0])
    with mode():
        rounds.finish()
    train(model, optimizer, rounds, range(3))
    assert_same_on_all_ranks(flat(model))


def test_a_rank_without_data_goes_on_calling_step():
    model, optimizer, rounds = start()
    for step in range(6):
        if hvd.rank():
            rounds.step()
        else:
            train(model, optimizer, rounds, [step])
    assert_same_on_all_ranks(flat(model))


def test_frozen_parameters_stay_and_unfrozen_ones_are_refused():
    model = net_without_vectors()
    model[1].weight.requires_grad_(False)
    model, optimizer, rounds = start(model)
    frozen = model[1].weight.clone()
    train(model, optimizer, rounds, range(3))
    model[2].weight.requires_grad_(False)  # in the meantime
    second = model[2].weight.clone()
    train(model, optimizer, rounds, range(3, 9))
    assert torch.equal(model[1].weight, frozen)
    assert torch.equal(model[2].weight, second)
    assert_same_on_all_ranks(flat(model))
    model[1].weight.requires_grad_(True)
    with pytest.raises(DLSError, match=r"'1.weight' .* unfrozen"):
        train(model, optimizer, rounds, range(3))


def test_buffers_that_are_alike_stay_to_the_bit():
    model = net()
    model.register_buffer("mask", torch.tensor([torch.finfo(torch.float32).min, -torch.inf, 0.1]))
    model.register_buffer("large", torch.tensor([1e300, 1e9 + 1e-6]).double())
    before = [model.mask.clone(), model.large.clone()]
    _, optimizer, rounds = start(model)
    train(model, optimizer, rounds, range(6))
    assert torch.equal(model.mask, before[0])
    assert torch.allclose(model.large, before[1], rtol=1e-15, atol=0)


def test_a_checkpoint_goes_on_to_the_bit(tmp_path_factory):
    folder = hvd.broadcast_object(str(tmp_path_factory.mktemp("rounds")), name="folder")
    how = {"momentum": 0.5, "optimizer": torch.optim.SGD}
    model, optimizer, rounds = start(**how)
    train(model, optimizer, rounds, range(6))
    save_checkpoint(
        folder, {"model": model.state_dict(), "rounds": rounds.state_dict()}, rounds.compression
    )
    train(model, optimizer, rounds, range(6, 12))
    torch.manual_seed(5)
    again, optimizer, rounds = start(**how)
    state = load_checkpoint(folder, rounds.compression)
    again.load_state_dict(state["model"])
    rounds.load_state_dict(state["rounds"])
    train(again, optimizer, rounds, range(6, 12))
    assert torch.equal(flat(again), flat(model))


def test_in_an_elastic_job_nothing_is_exchanged_while_it_is_made(monkeypatch):
    """Those who were there before are elsewhere when a newcomer makes it."""
    monkeypatch.setenv("HOROVOD_ELASTIC", "1")
    model = net_without_vectors()
    with torch.no_grad():
        model[1].weight += hvd.rank()
    if hvd.rank():
        LocalSteps(model)
    model, optimizer, rounds = start(model)
    hvd.elastic.TorchState(model=model, rounds=rounds).sync()
    assert_same_on_all_ranks(flat(model))
    train(model, optimizer, rounds, range(3))
    assert_same_on_all_ranks(flat(model))


def test_elastic_states_know_of_rounds():
    model, optimizer, rounds = start(momentum=0.5, optimizer=torch.optim.SGD)
    state = hvd.elastic.TorchState(model=model, optimizer=optimizer, rounds=rounds, step=0)
    train(model, optimizer, rounds, range(3))
    state.commit()
    train(model, optimizer, rounds, range(3, 8))
    state.restore()
    train(model, optimizer, rounds, range(3, 6))
    expected = flat(model)
    state.restore()
    train(model, optimizer, rounds, range(3, 6))
    assert torch.equal(flat(model), expected)
    with torch.no_grad():  # who joins has other weights
        for parameter in model.parameters():
            parameter += hvd.rank()
        for common in rounds._common.values():
            common += hvd.rank()
    rounds._epoch = None
    state.sync()
    assert torch.equal(flat(model), expected)
    train(model, optimizer, rounds, range(6, 9))
    assert_same_on_all_ranks(flat(model))
