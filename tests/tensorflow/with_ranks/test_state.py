"""Residuals, ratios and thresholds are training state; pickles carry options only."""

import copy
import pickle

import numpy as np
import pytest

from hvd_dls import DLSError, StateMismatchError
from hvd_dls.tensorflow import DLSCompressor
from tests.tensorflow.with_ranks.training import (
    SPARSE,
    Net,
    Trainer,
    assert_same_on_all_ranks,
    flat,
)


def saved(value):
    """Through bytes and back, as a checkpoint would go."""
    return pickle.loads(pickle.dumps(value))


@pytest.mark.parametrize(
    ("mode", "given"), [("eager", False), ("tf.function", False), ("tf.function", True)]
)
def test_a_restart_goes_on_bit_for_bit(mode, given):
    def start(seed):
        model = Net(seed=seed)
        variables = model.parameters if given else None
        compression = DLSCompressor(variables, density=0.05, **SPARSE)
        return model, compression, Trainer(model, compression, mode)

    model, compression, trainer = start(1)
    trainer.train(range(6))
    weights = [p.numpy() for p in model.parameters]
    state = saved(compression.state_dict())
    assert sum(np.abs(r).sum() for r in state["models"][0]["residuals"].values()) > 0
    trainer.train(range(6, 12))

    again, compression_again, trainer_again = start(2)
    for variable, value in zip(again.parameters, weights, strict=True):
        variable.assign(value)
    compression_again.load_state_dict(state)  # waits for the first step
    assert compression_again.state_dict() is not None
    trainer_again.train(range(6, 12))
    np.testing.assert_array_equal(flat(model), flat(again))
    assert compression_again.last_step().step == 12
    assert_same_on_all_ranks(flat(again))


def test_a_state_can_be_loaded_between_steps(mode):
    model, compression = Net(), DLSCompressor(density=0.05, **SPARSE)
    trainer = Trainer(model, compression, mode)
    trainer.train(range(3))
    weights = [p.numpy() for p in model.parameters]
    state = saved(compression.state_dict())
    trainer.train(range(3, 6))
    expected = flat(model)
    for variable, value in zip(model.parameters, weights, strict=True):
        variable.assign(value)
    compression.load_state_dict(state)
    trainer.train(range(3, 6))
    np.testing.assert_array_equal(flat(model), expected)


def test_a_state_of_other_layers_options_or_ranks_is_refused_by_name():
    compression = DLSCompressor(density=0.05, **SPARSE)
    Trainer(Net(), compression, "tf.function").train(range(2))
    denser = DLSCompressor(density=0.1, **SPARSE)
    Trainer(Net(), denser, "tf.function").train(range(2))
    with pytest.raises(StateMismatchError, match=r"density=0.1.*0.05"):
        compression.load_state_dict(denser.state_dict())
    more_ranks = saved(compression.state_dict())
    more_ranks["models"][0]["world_size"] = 64
    with pytest.raises(StateMismatchError, match="64 ranks"):
        compression.load_state_dict(more_ranks)
    other = saved(compression.state_dict())
    other["models"][0]["layers"][0][1] = [1, 2]
    waits = DLSCompressor(density=0.05, **SPARSE)
    waits.load_state_dict(other)
    with pytest.raises(Exception, match=r"layer 'conv' was saved as \[1, 2\]"):
        Trainer(Net(), waits, "tf.function").train(range(1))
    with pytest.raises(StateMismatchError, match="version"):
        compression.load_state_dict({"version": 99})


def test_a_pickle_carries_the_options_of_a_compressor_that_knows_no_model():
    compression = DLSCompressor(density=0.05, **SPARSE)
    again = saved(compression)
    assert again.config == compression.config
    Trainer(Net(), compression, "tf.function").train(range(2))
    for bound in (compression, DLSCompressor(Net().parameters)):
        for copied in (saved, copy.deepcopy):
            with pytest.raises(DLSError, match="models"):
                copied(bound)
    with pytest.raises(DLSError, match="loss_scale"):
        saved(DLSCompressor(loss_scale=lambda: 1.0))
