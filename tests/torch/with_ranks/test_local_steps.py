"""``LocalSteps``: laws, refusals, state, and what users do in the middle of a round."""

import copy

import horovod.torch as hvd
import pytest
import torch
from torch import nn

from hvd_dls import DLSError, NonFiniteGradientError, RanksDisagreeError
from hvd_dls.torch import DLSCompressor, LocalSteps, load_checkpoint, save_checkpoint
from tests.torch.with_ranks.training import (
    SPARSE,
    assert_same_on_all_ranks,
    batch,
    flat,
    net,
    net_without_vectors,
)


def start(model=None, every=3, lr=1.0, momentum=0.0, optimizer=torch.optim.Adam, **options):
    """Model, its optimizer, and rounds."""
    model = model or net_without_vectors()
    compression = DLSCompressor(**{"density": 0.05} | SPARSE | options)
    rounds = LocalSteps(model, compression, every=every, lr=lr, momentum=momentum)
    return model, optimizer(model.parameters(), lr=0.01), rounds


def train(model, optimizer, rounds, steps):
    """Returns in which steps a round has ended."""
    ended = []
    for step in steps:
        optimizer.zero_grad()
        images, labels = batch(step)
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        if rounds.step():
            ended.append(step)
    return ended


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


def poison(model):
    """NaN on the last rank."""
    if hvd.rank() == hvd.size() - 1:
        with torch.no_grad():
            next(model.parameters()).view(-1)[0] = torch.nan


def test_nan_on_one_rank_is_raised_on_all_which_go_back_to_the_rounds_begin():
    model, optimizer, rounds = start(optimizer=torch.optim.SGD)
    train(model, optimizer, rounds, range(3))
    begin = flat(model)
    train(model, optimizer, rounds, [3, 4])
    poison(model)
    with pytest.raises(NonFiniteGradientError, match=str(hvd.size() - 1)):
        rounds.step()
    assert torch.equal(flat(model), begin)
    train(model, optimizer, rounds, range(3))
    assert_same_on_all_ranks(flat(model))
    assert torch.isfinite(flat(model)).all()


def test_nan_is_skipped():
    model, optimizer, rounds = start(optimizer=torch.optim.SGD, nonfinite="skip")
    begin = flat(model)
    poison(model)
    rounds.finish()
    assert torch.equal(flat(model), begin)
    train(model, optimizer, rounds, range(3))
    assert_same_on_all_ranks(flat(model))


@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
def test_statistics_of_a_batch_with_nan_reach_no_rank(nonfinite):
    model, optimizer, rounds = start(net(), every=1, nonfinite=nonfinite)
    train(model, optimizer, rounds, range(2))
    begin = model[1].running_mean.clone()
    if hvd.rank() == 0:
        with torch.no_grad():
            model(torch.full((2, 3, 4, 4), torch.nan))
    poison(model)
    if nonfinite == "raise":
        with pytest.raises(NonFiniteGradientError):
            rounds.finish()
    else:
        rounds.finish()
        assert_same_on_all_ranks(model[1].running_mean)
    assert torch.allclose(model[1].running_mean, begin)
    train(model, optimizer, rounds, range(2, 4))
    assert torch.isfinite(model[1].running_mean).all()
    assert_same_on_all_ranks(model[1].running_mean)


def test_buffers_that_are_alike_stay_to_the_bit():
    model = net()
    model.register_buffer("mask", torch.tensor([torch.finfo(torch.float32).min, -torch.inf, 0.1]))
    model.register_buffer("large", torch.tensor([1e300, 1e9 + 1e-6]).double())
    before = [model.mask.clone(), model.large.clone()]
    _, optimizer, rounds = start(model)
    train(model, optimizer, rounds, range(6))
    assert torch.equal(model.mask, before[0])
    assert torch.allclose(model.large, before[1], rtol=1e-15, atol=0)


def test_a_rank_that_gives_an_exchange_up():
    """An interrupt while a rank waits: all go back to the round's begin, and on."""
    model, optimizer, rounds = start()
    train(model, optimizer, rounds, range(3))
    begin = flat(model)
    train(model, optimizer, rounds, [3, 4])
    if hvd.rank() == 0:
        original, calls = rounds.compression.compress, []

        def interrupted(tensor):
            calls.append(1)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return original(tensor)

        rounds.compression.compress = interrupted
        with pytest.raises(KeyboardInterrupt):
            rounds.step()
        del rounds.compression.compress
        rounds.compression.abandon_step()
    else:
        with pytest.raises(RanksDisagreeError):
            rounds.step()
    assert torch.equal(flat(model), begin)
    train(model, optimizer, rounds, range(3, 6))
    assert_same_on_all_ranks(flat(model))


@pytest.mark.parametrize("place", ["compress", "decompress"])
@pytest.mark.parametrize("compression", ["dls", "fp16"])
def test_an_interrupt_that_a_rank_does_not_tell_of_leaves_nobody_waiting(compression, place):
    """The next round ends it: others are told, or that the ranks' common weights differ."""
    model, optimizer, rounds = start(net())
    if compression == "fp16":
        rounds = LocalSteps(model, type("Fp16", (hvd.Compression.fp16,), {}), every=3)
    train(model, optimizer, rounds, range(5))
    original, calls = getattr(rounds.compression, place), []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments)

    def train_or_be_refused(steps):
        try:
            train(model, optimizer, rounds, steps)
        except RanksDisagreeError:
            return 1
        return 0

    if hvd.rank() == 0:
        setattr(rounds.compression, place, interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(model, optimizer, rounds, [5])
        setattr(rounds.compression, place, original)
        train_or_be_refused(range(6, 9))
    else:
        assert train_or_be_refused([5]) + train_or_be_refused(range(6, 9))
    rounds.restart()
    train(model, optimizer, rounds, range(9, 12))
    assert_same_on_all_ranks(flat(model))


def test_different_lengths_of_rounds_are_refused_on_all_ranks():
    model, optimizer, rounds = start(every=1 + hvd.rank())
    with pytest.raises(RanksDisagreeError, match="every"):
        train(model, optimizer, rounds, range(1 + hvd.rank()))


def test_options_that_differ_are_refused_on_all_ranks():
    model, optimizer, rounds = start()
    train(model, optimizer, rounds, range(3))
    rounds.optimizer.param_groups[0]["lr"] = 1.0 + hvd.rank()
    with pytest.raises(RanksDisagreeError, match="options of LocalSteps' optimizer"):
        train(model, optimizer, rounds, range(3))
    rounds.optimizer.param_groups[0]["lr"] = 0.5
    train(model, optimizer, rounds, range(3))
    assert_same_on_all_ranks(flat(model))


def more_layers():
    return nn.Sequential(*[nn.Linear(2, 2) for _ in range(1 + hvd.rank())])


def other_layers():
    return nn.Linear(2, 2 + hvd.rank())


def other_frozen():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].weight.requires_grad_(hvd.rank() == 0)
    return model


@pytest.mark.parametrize("model", [more_layers, other_layers, other_frozen])
def test_different_models_are_refused_on_all_ranks(model):
    with pytest.raises(RanksDisagreeError, match="models differ"):
        LocalSteps(model())


def test_a_state_that_one_rank_alone_loads_is_found_out():
    model, optimizer, rounds = start()
    state = rounds.state_dict()
    train(model, optimizer, rounds, range(3))
    if hvd.rank() == 0:
        rounds.load_state_dict(state)
    with pytest.raises(RanksDisagreeError, match="common weights differ"):
        train(model, optimizer, rounds, range(3))


def test_different_common_weights_are_refused_on_all_ranks():
    model, optimizer, rounds = start()
    state = rounds.state_dict()
    state["common"]["1.weight"] += hvd.rank()
    rounds.load_state_dict(state)
    with pytest.raises(RanksDisagreeError, match="common weights differ"):
        train(model, optimizer, rounds, range(3))
    rounds.restart()
    train(model, optimizer, rounds, range(3))
    assert_same_on_all_ranks(flat(model))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"every": 0}, "every=0"),
        ({"every": 2.0}, "every=2.0"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"lr": "1"}, "lr='1'"),
        ({"momentum": 1.0}, "momentum=1.0"),
        ({"momentum": None}, "momentum=None"),
        ({"compression": 0.05}, r"DLSCompressor\(density=0.05\)"),
        ({"compression": torch.optim.SGD([torch.ones(1)], 0.1)}, "SGD.* is not passed"),
        ({"process_set": [0]}, "hvd.add_process_set"),
        ({"process_set": hvd.ProcessSet([0])}, "hvd.add_process_set"),
        ({"compression": DLSCompressor(adam=(0.5, 0.999))}, "AdamW"),
        ({"compression": DLSCompressor(loss_scale=lambda: 1.0)}, "loss_scale"),
        ({"compression": DLSCompressor([("weight", nn.Parameter(torch.ones(2)))])}, "named_par"),
    ],
)
def test_arguments_that_are_not_accepted(arguments, words):
    with pytest.raises(DLSError, match=words):
        LocalSteps(nn.Linear(2, 2), **arguments)


def test_a_model_is_wanted():
    with pytest.raises(DLSError, match=r"torch\.nn\.Module"):
        LocalSteps(nn.Linear(2, 2).parameters())
    with pytest.raises(DLSError, match="without parameters that are trained"):
        LocalSteps(nn.Linear(2, 2).requires_grad_(False))


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


def test_a_state_of_another_model_is_refused():
    _, _, rounds = start()
    other = LocalSteps(nn.Linear(3, 2)).state_dict()
    with pytest.raises(DLSError, match="another model"):
        rounds.load_state_dict(other)
    with pytest.raises(DLSError, match="accepted is what state_dict"):
        rounds.load_state_dict({"model": {}})


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
