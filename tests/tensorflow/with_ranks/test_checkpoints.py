"""Checkpoints with TensorFlow's tape."""

import tempfile

import horovod.tensorflow as hvd
import numpy as np
import pytest
import tensorflow as tf

from hvd_dls import CheckpointError, StateMismatchError
from hvd_dls.tensorflow import DLSCompressor, load_checkpoint, save_checkpoint
from tests.tensorflow.with_ranks.training import (
    SPARSE,
    Net,
    Trainer,
    assert_same_on_all_ranks,
    flat,
)


def start(mode, seed=1, **options):
    model = Net(seed=seed)
    compression = DLSCompressor(**{"density": 0.05, "momentum": 0.9, **SPARSE, **options})
    return model, compression, Trainer(model, compression, mode)


def saved_of(model):
    """As a user would have it."""
    return tf.train.Checkpoint(model=model)


@pytest.mark.parametrize(
    ("mode", "shared", "known", "options"),
    [
        ("eager", True, True, {}),
        ("tf.function", False, True, {}),
        ("eager", False, False, {}),
        ("tf.function", True, False, {"momentum": 0.0, "adam": (0.5, 0.999)}),
    ],
    ids=lambda value: f"{value:d}" if isinstance(value, bool) else str(value),
)
def test_a_training_goes_on_bit_for_bit(mode, shared, known, options):
    folder = tempfile.mkdtemp()
    if shared:
        folder = hvd.broadcast_object(folder, name="folder")
    model, compression, trainer = start(mode, **options)
    assert load_checkpoint(folder, saved_of(model), compression) is None
    trainer.train(range(4))
    written = save_checkpoint(folder, saved_of(model), compression)
    trainer.train(range(4, 8))
    if known:
        again, other, retrained = model, compression, trainer
        expected = flat(model)
    else:
        again, other, retrained = start(mode, seed=2, **options)
        expected = flat(model)
    assert load_checkpoint(folder, saved_of(again), other) == written
    retrained.train(range(4, 8))
    np.testing.assert_array_equal(flat(again), expected)
    assert other.last_step().step == 8
    assert_same_on_all_ranks(flat(again))


def test_what_does_not_fit_is_refused_on_all_ranks(mode):
    folder = hvd.broadcast_object(tempfile.mkdtemp(), name="folder")
    model, compression, trainer = start(mode)
    trainer.train(range(2))
    save_checkpoint(folder, saved_of(model), compression)
    _, denser, _ = start(mode, density=0.1)
    with pytest.raises(StateMismatchError, match=r"density=0.05, but it is 0.1 now"):
        load_checkpoint(folder, saved_of(model), denser)
    model.parameters[0] = tf.Variable(tf.zeros([3]))
    with pytest.raises(CheckpointError):
        load_checkpoint(folder, tf.train.Checkpoint(model=model))
