"""Saved states are checked before they are taken: whose they are, and what they hold."""

import pickle

import horovod.tensorflow as hvd
import numpy as np
import pytest
import tensorflow as tf

from hvd_dls import DLSError, StateMismatchError
from hvd_dls.tensorflow import DLSCompressor
from tests.tensorflow.with_ranks.training import (
    SPARSE,
    Net,
    Trainer,
    assert_same_on_all_ranks,
    flat,
    reduced,
    whole_numbers,
)

# Of what the way in which a step runs makes no difference to: tracing takes its time.
eagerly = pytest.mark.parametrize("mode", ["eager"])


def trained(mode, steps=3, **options):
    model = Net()
    compression = DLSCompressor(density=0.05, **SPARSE, **options)
    trainer = Trainer(model, compression, mode)
    trainer.train(range(steps))
    return model, compression, trainer


def assert_refused(compression, trainer, state, message):
    """On every rank, before anything has changed; then training goes on."""
    before = pickle.dumps(compression.state_dict())
    with pytest.raises(DLSError, match=message):
        compression.load_state_dict(state)
    assert pickle.dumps(compression.state_dict()) == before
    trainer.train([7])
    assert_same_on_all_ranks(flat(trainer.model))


def assert_refused_in_the_first_step(mode, state, message, **options):
    compression = DLSCompressor(density=0.05, **SPARSE, **options)
    compression.load_state_dict(state)
    with pytest.raises(Exception, match=message):
        Trainer(Net(), compression, mode).train(range(1))


def copy_of(state):
    return pickle.loads(pickle.dumps(state))


@eagerly
def test_a_rank_does_not_take_another_ranks_state(mode):
    _, compression, trainer = trained(mode)
    first = hvd.broadcast_object(copy_of(compression.state_dict()), root_rank=0)
    assert_refused(compression, trainer, first, "saved by rank 0, but this is rank 1")
    assert_refused_in_the_first_step(mode, first, "saved by rank 0, but this is rank 1")


@eagerly
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_state_that_is_not_finite_is_refused_on_all_ranks(mode, value):
    _, compression, trainer = trained(mode)
    state = copy_of(compression.state_dict())
    if hvd.rank() == 1:
        state["models"][0]["residuals"]["hidden"][17] = value
    message = f"layer 'hidden': residuals hold {value} at entry 17"
    assert_refused(compression, trainer, state, message)
    assert_refused_in_the_first_step(mode, state, message)


@eagerly
def test_a_state_that_sends_more_entries_than_a_layer_has_is_refused(mode):
    _, compression, trainer = trained(mode)
    state = copy_of(compression.state_dict())
    if hvd.rank() == 1:
        state["models"][0]["ratios"][2] += 100_000
    assert_refused(compression, trainer, state, r"layer 'conv': sends 1\d{5} entries")


@eagerly
@pytest.mark.parametrize(
    "empty", [{"version": 1, "models": []}, {"version": 1, "models": [{}]}, {}]
)
def test_an_empty_state_is_refused_by_a_trained_compressor(mode, empty):
    _, compression, trainer = trained(mode)
    assert_refused(compression, trainer, empty, "saved state")


@eagerly
def test_an_empty_state_on_one_rank_only_is_refused_on_all(mode):
    _, compression, trainer = trained(mode)
    own = copy_of(compression.state_dict())
    empty = {"version": 1, "models": []}
    assert_refused(compression, trainer, own if hvd.rank() else empty, "saved state")


@eagerly
def test_a_fresh_compressors_state_can_be_loaded_by_a_fresh_one(mode):
    state = DLSCompressor(density=0.05, **SPARSE).state_dict()
    compression = DLSCompressor(density=0.05, **SPARSE)
    compression.load_state_dict(state)
    Trainer(Net(), compression, mode).train(range(2))
    assert compression.last_step().step == 2


def test_numbers_of_numpy_do_not_get_into_a_state():
    _, compression, _ = trained("tf.function", momentum=np.float32(0.5))
    compression = DLSCompressor(density=np.float32(0.05), min_k=np.int64(2), **SPARSE)
    Trainer(Net(), compression, "tf.function").train(range(1))
    (state,) = compression.state_dict()["models"]
    assert {type(state["config"][option]) for option in ("density", "momentum")} == {float}
    assert type(state["config"]["min_k"]) is int


@eagerly
def test_a_state_is_found_by_what_it_is_of(mode):
    """Not by the order in which models train."""

    def start(seed, width):
        model = Net(seed=seed)
        extra = tf.Variable(tf.ones([5, width]), name="extra")
        model.parameters.append(extra)
        return model

    compression = DLSCompressor(density=0.05, **SPARSE)
    models = [start(1, 3), start(1, 4)]

    def train(compression, models):
        for model in models:
            gradients = [whole_numbers(p.shape, 0) for p in model.parameters]
            reduced(model.parameters, gradients, compression, mode)

    train(compression, models)
    saved = copy_of(compression.state_dict())
    again = DLSCompressor(density=0.05, **SPARSE)
    again.load_state_dict(saved)
    train(again, models[::-1])
    assert [m["step"] for m in again.state_dict()["models"]] == [2, 2]
    with pytest.raises(StateMismatchError):
        again.load_state_dict({"version": 1, "models": saved["models"][:1]})
