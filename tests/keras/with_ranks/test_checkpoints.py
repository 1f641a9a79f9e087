"""Checkpoints with Keras 3: a callback saves, another training goes on from there."""

import tempfile

import horovod.tensorflow as horovod
import keras
import numpy as np
import pytest

import hvd_dls.keras as hvd
from hvd_dls import CheckpointError, DLSError, StateMismatchError
from tests.keras.with_ranks.keras3 import compiled, compressor
from tests.keras.with_ranks.training import assert_same_on_all_ranks, data, flat


def shared_folder():
    """The same on all ranks."""
    own = tempfile.mkdtemp() if hvd.rank() == 0 else None
    return horovod.broadcast_object(own, name="folder")


def fit(model, first, last, *callbacks):
    images, labels = data()
    model.fit(
        images,
        labels,
        8,
        epochs=last,
        initial_epoch=first,
        shuffle=False,
        verbose=0,
        callbacks=[hvd.callbacks.BroadcastGlobalVariablesCallback(0), *callbacks],
    )


@pytest.mark.parametrize("compressed", [True, False])
def test_a_training_goes_on_bit_for_bit(compressed):
    def start(seed):
        # Momentum of the optimizer, for what is not compressed: its state is in the checkpoint.
        compression = compressor(warmup_steps=6) if compressed else None
        model = compiled(compression or hvd.Compression.none, seed=seed)
        return model, compression

    model, _ = start(1)
    fit(model, 0, 4)
    folder = shared_folder()
    stopped, compression = start(1)
    checkpoints = hvd.callbacks.CheckpointCallback(folder, compression, every=2, keep=1)
    assert checkpoints.restore(stopped) == 0
    fit(stopped, 0, 3, checkpoints)
    again, compression = start(2)
    checkpoints = hvd.callbacks.CheckpointCallback(folder, compression)
    assert checkpoints.restore(again) == 2
    fit(again, 2, 4, checkpoints)
    assert np.array_equal(flat(again), flat(model))
    assert_same_on_all_ranks(flat(again))
    if compressed:
        assert compression.last_step().step == 16
        with pytest.raises(DLSError, match="every=0"):
            hvd.callbacks.CheckpointCallback(folder, compression, every=0)


def test_what_does_not_fit_is_refused_on_all_ranks():
    folder, compression = shared_folder(), compressor()
    model = compiled(compression)
    with pytest.raises(DLSError, match="compile the model"):
        hvd.callbacks.CheckpointCallback(folder, compression).restore(keras.Sequential())
    fit(model, 0, 1, hvd.callbacks.CheckpointCallback(folder, compression))
    weights, denser = flat(model), compressor(density=0.2)
    other = compiled(denser, seed=3)
    before = flat(other)
    with pytest.raises(StateMismatchError, match=r"density=0.05, but it is 0.2 now"):
        hvd.callbacks.CheckpointCallback(folder, denser).restore(other)
    assert np.array_equal(flat(other), before)
    wider = keras.Sequential([keras.layers.Input((9,)), keras.layers.Dense(7)])
    wider.compile(hvd.DistributedOptimizer(keras.optimizers.SGD()), "mse")
    with pytest.raises(CheckpointError):
        hvd.callbacks.CheckpointCallback(folder).restore(wider)
    assert np.array_equal(flat(model), weights)
