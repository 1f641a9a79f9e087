"""States that are damaged or belong elsewhere: refused by all ranks, before anything changes."""

import copy
import gc
import io
import math

import horovod.torch as hvd
import numpy as np
import pytest
import torch
from torch import nn

from hvd_dls import DLSError, StateMismatchError
from hvd_dls.torch import DLSCompressor
from tests.torch.with_ranks.test_training_options import everything
from tests.torch.with_ranks.training import (
    SPARSE,
    assert_same_on_all_ranks,
    batch,
    flat,
    net_without_vectors,
    train,
    wrap,
)


def odd() -> bool:
    return hvd.rank() == hvd.size() - 1


def start(**options):
    torch.manual_seed(1)
    model = net_without_vectors()
    compression = DLSCompressor(**{"density": 0.05, **SPARSE, **options})
    return model, wrap(model, compression), compression


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# Damage -----------------------------------------------------------------------------------------


def another_rank_s(state):
    return hvd.broadcast_object(state, name="rank.0.s")


def with_number(part, value):
    def damage(state):
        name = "2.weight"
        if part == "thresholds":
            state["models"][0][part][1] = value
        else:
            state["models"][0][part][name][7] = value
        return state

    return damage


def k_beyond_the_layer(state):
    ratios = state["models"][0]["ratios"]
    layers = len(state["models"][0]["layers"])
    state["models"][0]["ratios"] = ratios[:2] + [10**6] * layers + ratios[2 + layers :]
    return state


def empty(state):
    return {}


def no_models(state):
    return state | {"models": []}


def an_empty_model(state):
    return state | {"models": [{}]}


def another_version(state):
    return state | {"version": 99}


def another_version_of_a_model(state):
    state["models"][0]["version"] = 99
    return state


DAMAGED = {
    "another rank's": another_rank_s,
    "NaN in a residual": with_number("residuals", math.nan),
    "Inf in a velocity": with_number("velocities", math.inf),
    "NaN as threshold": with_number("thresholds", math.nan),
    "k beyond a layer": k_beyond_the_layer,
    "empty": empty,
    "no models": no_models,
    "an empty model": an_empty_model,
    "another version": another_version,
    "another version of a model": another_version_of_a_model,
}


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_state_of_one_rank_is_refused_by_all_that_have_trained(damage):
    inner = {"momentum": 0.9}
    expected, optimizer, _ = start(**inner)
    optimizer.param_groups[0]["momentum"] = 0
    train(expected, optimizer, range(6))

    model, optimizer, compression = start(**inner)
    optimizer.param_groups[0]["momentum"] = 0
    train(model, optimizer, range(4))
    state = through_a_file(compression.state_dict())
    before = everything(model, optimizer, compression)
    if damage is another_rank_s or odd():
        state = damage(state)
    with pytest.raises(DLSError) as error:
        compression.load_state_dict(state)
    assert isinstance(error.value, StateMismatchError) or not odd()
    assert everything(model, optimizer, compression) == before
    train(model, optimizer, range(4, 6))
    assert torch.equal(flat(model), flat(expected))


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_state_of_one_rank_is_refused_by_all_before_or_in_the_first_step(damage):
    """Where loading needs no other rank, the one that met it raises at once."""
    model, optimizer, compression = start(momentum=0.9)
    optimizer.param_groups[0]["momentum"] = 0
    train(model, optimizer, range(2))
    state = through_a_file(compression.state_dict())
    if damage is another_rank_s or odd():
        state = damage(state)
    model, optimizer, compression = start(momentum=0.9)
    optimizer.param_groups[0]["momentum"] = 0
    refused = False
    try:
        compression.load_state_dict(state)
    except StateMismatchError:
        refused = True
    refusals = hvd.allgather(torch.tensor([int(refused)]), name="refusals")
    if not refusals.any():
        with pytest.raises(DLSError):
            train(model, optimizer, [2])


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "first step"])
def test_states_of_other_steps_are_refused_by_all(trained):
    model, optimizer, compression = start()
    states = []
    for step in range(4):
        train(model, optimizer, [step])
        states.append(copy.deepcopy(compression.state_dict()))
    state = states[2 if odd() else 3]
    if trained:
        before = everything(model, optimizer, compression)
        with pytest.raises(DLSError, match=r"step"):
            compression.load_state_dict(state)
        assert everything(model, optimizer, compression) == before
        train(model, optimizer, [4])
        assert_same_on_all_ranks(flat(model))
    else:
        model, optimizer, compression = start()
        compression.load_state_dict(state)
        with pytest.raises(DLSError, match=r"step"):
            train(model, optimizer, [4])


def test_one_rank_without_its_file_is_told_to_all():
    model, optimizer, compression = start()
    train(model, optimizer, range(3))
    state = copy.deepcopy(compression.state_dict())
    model, optimizer, compression = start()
    if not odd():
        compression.load_state_dict(state)
    with pytest.raises(DLSError, match="state"):
        train(model, optimizer, [3])


def test_a_good_state_is_loaded_by_all_and_bound_to_nothing():
    model, optimizer, compression = start()
    train(model, optimizer, range(3))
    weights, inner = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    state = through_a_file(compression.state_dict())
    assert state["models"][0]["rank"] == hvd.rank()
    train(model, optimizer, range(3, 6))
    expected = flat(model)
    for _ in range(2):
        model.load_state_dict(weights)
        optimizer.load_state_dict(copy.deepcopy(inner))  # torch goes on in what it is given
        compression.load_state_dict(state)
        train(model, optimizer, range(3, 6))
        assert torch.equal(flat(model), expected)


def test_numpy_numbers_as_options_can_be_saved():
    model, optimizer, compression = start(density=np.float32(0.05), min_k=np.int64(2))
    train(model, optimizer, range(2))
    state = through_a_file(compression.state_dict())
    model, optimizer, compression = start(density=np.float32(0.05), min_k=np.int64(2))
    compression.load_state_dict(state)
    train(model, optimizer, range(2, 4))
    assert compression.last_step().step == 4


# Several models ---------------------------------------------------------------------------------


def test_models_that_are_gone_are_forgotten():
    """Folds: a new process, with the last model only, goes on as the last model does."""
    DLSCompressor._default_instance = DLSCompressor(density=0.05, **SPARSE)
    for fold in range(3):
        torch.manual_seed(fold)
        model = net_without_vectors()
        optimizer = wrap(model, DLSCompressor)
        train(model, optimizer, range(10 * fold, 10 * fold + 3))
    gc.collect()
    state = through_a_file(DLSCompressor.state_dict())
    assert len(state["models"]) == 1
    checkpoint = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    train(model, optimizer, range(40, 43))

    DLSCompressor._default_instance = DLSCompressor(density=0.05, **SPARSE)
    again = net_without_vectors()
    optimizer = wrap(again, DLSCompressor)
    DLSCompressor.load_state_dict(state)
    again.load_state_dict(checkpoint[0])
    optimizer.load_state_dict(checkpoint[1])
    train(again, optimizer, range(40, 43))
    assert torch.equal(flat(again), flat(model))
    assert_same_on_all_ranks(flat(again))


def generator_and_critic():
    torch.manual_seed(1)
    models = {
        "generator": nn.Sequential(nn.Flatten(), nn.Linear(48, 40, bias=False)),
        "critic": nn.Sequential(nn.Flatten(), nn.Linear(48, 30, bias=False)),
    }
    compression = DLSCompressor(density=0.05, **SPARSE)
    return models, {n: wrap(model, compression) for n, model in models.items()}, compression


def test_states_go_to_the_models_that_they_are_of():
    """In whatever order the models train."""
    models, optimizers, compression = generator_and_critic()
    for step in range(3):
        for name, model in models.items():
            train(model, optimizers[name], [step])
    state = through_a_file(compression.state_dict())
    parts = copy.deepcopy([[x[n].state_dict() for n in models] for x in (models, optimizers)])
    for name, model in models.items():
        train(model, optimizers[name], range(3, 6))

    again, optimizers, compression = generator_and_critic()
    compression.load_state_dict(state)
    for name, weights, inner in zip(again, *parts, strict=True):
        again[name].load_state_dict(weights)
        optimizers[name].load_state_dict(inner)
    for name in reversed(again):
        train(again[name], optimizers[name], range(3, 6))
    assert [s["step"] for s in compression.state_dict()["models"]] == [6, 6]
    for name in models:
        assert torch.equal(flat(models[name]), flat(again[name]))
        assert_same_on_all_ranks(flat(again[name]))


def test_a_model_that_has_not_come_yet_keeps_its_waiting_state():
    models, optimizers, compression = generator_and_critic()
    for name, model in models.items():
        train(model, optimizers[name], range(2))
    state = through_a_file(compression.state_dict())
    models, optimizers, compression = generator_and_critic()
    compression.load_state_dict(state)
    train(models["critic"], optimizers["critic"], [2])
    both = compression.state_dict()["models"]
    assert sorted(model["step"] for model in both) == [2, 3]


def test_a_copy_of_a_compressor_that_has_trained_is_refused():
    model, optimizer, compression = start()
    images, labels = batch(0)
    nn.functional.cross_entropy(model(images), labels).backward()
    optimizer.step()
    with pytest.raises(DLSError, match="state_dict"):
        copy.deepcopy(compression)
