"""``LocalSteps``: what is refused on all ranks, NaN, and interrupts of an exchange."""

import horovod.torch as hvd
import pytest
import torch
from torch import nn

from hvd_dls import DLSError, NonFiniteGradientError, RanksDisagreeError
from hvd_dls.torch import DLSCompressor, LocalSteps
from tests.torch.with_ranks.local_training import start, train
from tests.torch.with_ranks.training import assert_same_on_all_ranks, flat, net


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
    words = rf"weights.* on rank {hvd.size() - 1};.* round's begin.*nonfinite='skip'"
    with pytest.raises(NonFiniteGradientError, match=words) as raised:
        rounds.step()
    assert "loss_scale" not in str(raised.value)  # which LocalSteps refuses
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
        ({"lr": float("inf")}, "lr=inf"),
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


def test_a_state_of_another_model_is_refused():
    _, _, rounds = start()
    other = LocalSteps(nn.Linear(3, 2)).state_dict()
    with pytest.raises(DLSError, match="another model"):
        rounds.load_state_dict(other)
    with pytest.raises(DLSError, match="accepted is what state_dict"):
        rounds.load_state_dict({"model": {}})
