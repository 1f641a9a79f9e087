"""``hvd.elastic.TorchState``: commits, the way back to them, and what is copied from rank to rank.

What elastic Horovod does to it when workers come and go is done in tests/elastic, in real jobs.
"""

import copy
import logging
import random

import horovod.torch as hvd
import pytest
import torch
from horovod.common.exceptions import HorovodInternalError
from horovod.torch.elastic.state import OptimizerStateHandler

from hvd_dls import RanksDisagreeError, StateMismatchError
from hvd_dls.adapter.binding import _new_label
from hvd_dls.adapter.elastic import Commit
from hvd_dls.adapter.world import Ranks
from hvd_dls.torch import DLSCompressor
from tests.torch.with_ranks.training import (
    SPARSE,
    assert_same_on_all_ranks,
    flat,
    net_without_vectors,
    train,
    wrap,
)

USES = ("optimizer", "compression", "class")


def start(use="optimizer", **options):
    """Model, compressor, optimizer and a state that is to know of the compressor."""
    model = net_without_vectors()
    compression = DLSCompressor(density=0.05, **SPARSE | options)
    if use == "class":
        DLSCompressor._default_instance, compression = compression, DLSCompressor
    optimizer = wrap(model, compression, torch.optim.SGD(model.parameters(), lr=0.05))
    more = {} if use == "optimizer" else {"compression": compression}
    state = hvd.elastic.TorchState(model=model, optimizer=optimizer, step=0, **more)
    return model, compression, optimizer, state


def learnt(compression):
    """All that a compressor remembers, as text that tells every bit."""
    models = compression.state_dict()["models"]
    torch.set_printoptions(profile="full", precision=20)
    try:
        return repr([{**model, "rank": hvd.rank()} for model in models])
    finally:
        torch.set_printoptions(profile="default")


def broadcast(value):
    return hvd.broadcast_object(value, name="test")


@pytest.mark.parametrize("options", [{"momentum": 0.5}, {"adam": (0.5, 0.999)}], ids=str)
@pytest.mark.parametrize("use", USES)
def test_the_way_back_to_a_commit_is_exact(use, options):
    model, compression, optimizer, state = start(use, **options)
    train(model, optimizer, range(3))
    state.commit()
    committed = learnt(compression)
    train(model, optimizer, range(3, 6))
    expected, expected_state = flat(model), learnt(compression)
    assert committed != expected_state

    state.restore()
    assert learnt(compression) == committed
    train(model, optimizer, range(3, 6))
    assert torch.equal(flat(model), expected)
    assert learnt(compression) == expected_state

    state.restore()  # the second time, from a commit that training has not touched
    assert learnt(compression) == committed
    train(model, optimizer, range(3, 6))
    assert torch.equal(flat(model), expected)
    assert_same_on_all_ranks(flat(model))


def test_the_way_back_from_the_middle_of_a_step():
    model, compression, optimizer, state = start(bucket_bytes=1)
    train(model, optimizer, range(3))
    state.commit()
    train(model, optimizer, range(3, 5))
    expected = flat(model)
    state.restore()

    def fail(gradient):
        raise HorovodInternalError("for the test")

    hook = model[2].weight.register_hook(fail)
    with pytest.raises(HorovodInternalError, match="for the test"):
        train(model, optimizer, [9])
    hook.remove()
    compression.abandon_step()  # Horovod is well here, and ranks wait for each other
    state.restore()
    train(model, optimizer, range(3, 5))
    assert torch.equal(flat(model), expected)


@pytest.mark.parametrize("use", USES)
def test_the_way_back_to_before_the_first_step(use):
    model, compression, optimizer, state = start(use)
    train(model, optimizer, range(3))
    expected = flat(model)
    state.restore()
    assert not compression.state_dict()["models"]
    train(model, optimizer, range(3))
    assert torch.equal(flat(model), expected)


def test_the_way_back_to_a_loaded_state():
    model, compression, optimizer, _ = start()
    train(model, optimizer, range(3))
    saved = copy.deepcopy(compression.state_dict())
    weights = copy.deepcopy(model.state_dict())

    def again():
        model, compression, optimizer, _ = start()
        compression.load_state_dict(saved)
        model.load_state_dict(weights)
        state = hvd.elastic.TorchState(model=model, optimizer=optimizer)
        return model, compression, optimizer, state

    model, compression, optimizer, state = again()
    train(model, optimizer, range(3, 5))
    expected = flat(model)
    state.restore()
    train(model, optimizer, range(3, 5))
    assert torch.equal(flat(model), expected)
    assert compression.last_step().step == 5


@pytest.mark.parametrize("use", USES)
def test_nothing_that_waits_is_copied_from_rank_to_rank(use):
    model, compression, optimizer, state = start(use)
    train(model, optimizer, range(3))
    before = learnt(compression)
    (mine,) = compression.state_dict()["models"]
    everyone = hvd.allgather(mine["residuals"]["1.weight"][None], name="residuals")
    assert not torch.equal(everyone[0], everyone[1])  # or this test would show nothing
    state.sync()
    assert learnt(compression) == before


def test_sequences_of_commits_restores_and_steps():
    """Whatever comes after what: a restore gives what was there at the last commit, to the bit."""
    model, compression, optimizer, state = start("compression", momentum=0.5)
    generator, step = random.Random(2), 0
    train(model, optimizer, [0])
    state.commit()
    committed = flat(model), learnt(compression)
    for _ in range(40):
        match generator.choice(["train", "commit", "restore", "sync"]):
            case "train":
                step += 1
                train(model, optimizer, [step])
            case "commit":
                state.commit()
                committed = flat(model), learnt(compression)
            case "restore":
                state.restore()
                assert torch.equal(flat(model), committed[0])
                assert learnt(compression) == committed[1]
            case "sync":
                before = flat(model), learnt(compression)
                state.sync()
                assert torch.equal(flat(model), before[0])
                assert learnt(compression) == before[1]
    assert_same_on_all_ranks(flat(model))


def test_a_state_that_a_newcomer_has_loaded_is_dropped(caplog):
    model, compression, optimizer, _ = start()
    train(model, optimizer, range(3))
    newcomer = DLSCompressor(density=0.05, **SPARSE)
    newcomer.load_state_dict(copy.deepcopy(compression.state_dict()))
    with caplog.at_level(logging.WARNING, logger="hvd_dls"):
        Commit(compression if hvd.rank() == 0 else newcomer).sync(broadcast)
    assert bool(newcomer.state_dict()["models"]) == (hvd.rank() == 0)
    assert ("trained for 3 steps" in caplog.text) == (hvd.rank() > 0)


@pytest.fixture
def elastic(monkeypatch):
    """As in a job of which workers may come and go."""
    monkeypatch.setenv("HOROVOD_ELASTIC", "1")


def test_what_was_loaded_before_ranks_changed_goes_on_as_what_was_learnt(elastic):
    """To the bit, since there are as many ranks as before; tests/elastic has fewer."""
    model, compression, optimizer, _ = start(momentum=0.5)
    train(model, optimizer, range(3))
    saved = copy.deepcopy(compression.state_dict())
    weights = copy.deepcopy(model.state_dict())
    train(model, optimizer, range(3, 5))
    expected = flat(model)

    model, compression, optimizer, _ = start(momentum=0.5)
    compression.load_state_dict(saved)
    compression._loaded._ranks = Ranks(range(hvd.size()))  # not those of today, but as many
    model.load_state_dict(weights)
    train(model, optimizer, range(3, 5))
    assert torch.equal(flat(model), expected)
    assert compression.last_step().step == 5


def test_what_never_fitted_the_ranks_is_refused_after_a_change_too(elastic):
    model, compression, optimizer, _ = start()
    train(model, optimizer, range(3))
    saved = copy.deepcopy(compression.state_dict())
    model, compression, optimizer, _ = start()
    compression.load_state_dict(saved)
    compression._loaded._ranks = Ranks(range(hvd.size() + 1))
    with pytest.raises(StateMismatchError, match=f"saved by one of {hvd.size()} ranks"):
        train(model, optimizer, [3])


def test_what_a_newcomer_has_loaded_is_dropped_if_others_go_on_from_what_they_have(elastic, caplog):
    model, compression, optimizer, _ = start()
    train(model, optimizer, range(3))
    again = DLSCompressor(density=0.05, **SPARSE)
    again.load_state_dict(copy.deepcopy(compression.state_dict()))
    newcomer = hvd.rank() > 0
    if not newcomer:
        again._loaded._ranks = Ranks(range(hvd.size() + 1))
    commit = Commit(again)
    commit.sync(broadcast)
    commit.restore()
    assert bool(again.state_dict()["models"]) != newcomer
    assert ("the job it has joined has loaded one before" in caplog.text) == newcomer


def test_what_all_ranks_have_loaded_stays(caplog):
    model, compression, optimizer, _ = start()
    train(model, optimizer, range(3))
    again = DLSCompressor(density=0.05, **SPARSE)
    again.load_state_dict(copy.deepcopy(compression.state_dict()))
    Commit(again).sync(broadcast)
    assert again.state_dict()["models"]
    assert not caplog.text


def test_commits_of_different_steps_are_told(caplog):
    model, compression, optimizer, _ = start()
    train(model, optimizer, range(3))
    commit = Commit(compression)
    train(model, optimizer, [3])
    if hvd.rank() == 0:
        commit.save()
    commit.restore()
    with caplog.at_level(logging.WARNING, logger="hvd_dls"):
        commit.sync(broadcast)
    assert ("of step(s) [3], the weights of rank 0's step(s) [4]" in caplog.text) == (
        hvd.rank() > 0
    )
    train(model, optimizer, [4])
    assert compression.last_step().step == 5


def test_a_loaded_state_outlives_an_agreement_that_failed():
    """As one does in which a worker dies."""
    model, compression, optimizer, _ = start()
    train(model, optimizer, range(3))
    saved = copy.deepcopy(compression.state_dict())
    weights = copy.deepcopy(model.state_dict())
    train(model, optimizer, [3])
    expected = flat(model)

    model, compression, optimizer, _ = start()
    model.load_state_dict(weights)
    if hvd.rank() == 0:
        compression.load_state_dict(saved)
    with pytest.raises(RanksDisagreeError, match="saved state"):
        train(model, optimizer, [3])
    compression.abandon_step()
    if hvd.rank() != 0:
        compression.load_state_dict(saved)
    train(model, optimizer, [3])
    assert torch.equal(flat(model), expected)


def test_no_rank_would_call_a_new_model_as_another_one():
    """Any of them may be the first some day, and so the one that gives names."""
    model, compression, optimizer, _ = start()
    train(model, optimizer, [0])
    [of_model] = compression._bindings
    assert _new_label(of_model._world) != of_model._label


def test_another_optimizer_takes_the_place_of_one():
    model, compression, optimizer, state = start()
    train(model, optimizer, range(2))
    other = wrap(model, compression, torch.optim.SGD(model.parameters(), lr=0.01))
    state.optimizer = other
    before = learnt(compression)
    state.restore()
    assert learnt(compression) == before
    state.optimizer = torch.optim.SGD(model.parameters(), lr=0.01)  # without a compressor
    state.commit()
    state.restore()
    assert learnt(compression) == before


def test_other_optimizers_keep_horovods_handlers():
    model = net_without_vectors()
    state = hvd.elastic.TorchState(
        model=model,
        plain=torch.optim.SGD(model.parameters(), lr=0.1),
        dense=wrap(model, hvd.Compression.none),
        fp16=hvd.Compression.fp16,
    )
    kinds = {name: type(handler) for name, handler in state._handlers.items()}
    assert kinds["plain"] is kinds["dense"] is OptimizerStateHandler
    assert "fp16" not in kinds
