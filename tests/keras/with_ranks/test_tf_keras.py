"""tf_keras (Keras 2) with Horovod's own optimizer: jobs started with TF_USE_LEGACY_KERAS=1."""

import os
import tempfile

import horovod.tensorflow as horovod
import horovod.tensorflow.keras as hvd
import numpy as np
import pytest
import tensorflow as tf

if os.environ.get("TF_USE_LEGACY_KERAS") != "1":
    pytest.skip("needs TF_USE_LEGACY_KERAS=1", allow_module_level=True)

from hvd_dls.keras import callbacks
from hvd_dls.tensorflow import DLSCompressor, elastic
from tests.keras.with_ranks.training import (
    SPARSE,
    assert_nothing_is_lost,
    assert_same_on_all_ranks,
    by_fit,
    data,
    flat,
    net,
)

keras = tf.keras


def compiled(compression, optimizer=None, seed=1, **options):
    model = net(keras, seed)
    optimizer = optimizer or keras.optimizers.SGD(0.05, momentum=0.9)
    model.compile(
        hvd.DistributedOptimizer(optimizer, compression=compression, **options),
        "sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )
    return model


@pytest.mark.parametrize("who", ["class", "instance", "owners"])
def test_fit(who):
    class Bare(DLSCompressor):
        _default_instance = DLSCompressor(density=0.05, **SPARSE)

    exchange = "sparse_allreduce" if who == "owners" else "allgather"
    instance = DLSCompressor(density=0.05, exchange=exchange, **SPARSE)
    compression = Bare if who == "class" else instance
    model = compiled(compression, seed=hvd.rank())
    used = [
        hvd.callbacks.BroadcastGlobalVariablesCallback(0),
        callbacks.MetricAverageCallback(),  # Horovod's asks the keras module, which is Keras 3
        callbacks.LearningRateWarmupCallback(0.05, warmup_epochs=2),
    ]
    images, labels = data(40)  # 16 + 16 + 8: a smaller last batch
    model.fit(images, labels, 16, epochs=3, verbose=0, callbacks=used)
    record = compression.last_step()
    assert record.step == 9
    assert record.names == ("conv/kernel", "hidden/kernel", "out/kernel")
    assert_same_on_all_ranks(flat(model))


@pytest.mark.parametrize("exchange", ["allgather", "sparse_allreduce"])
def test_nothing_is_lost(exchange):
    compression = DLSCompressor(density=0.1, exchange=exchange, **SPARSE)
    optimizer = hvd.DistributedOptimizer(
        keras.optimizers.SGD(1.0), compression=compression, op=horovod.Sum
    )
    assert_nothing_is_lost(keras, optimizer, compression, by_fit)


@pytest.mark.parametrize("optimizer", ["Adam", "legacy.SGD"])
def test_other_optimizers(optimizer):
    if optimizer == "Adam":
        optimizer = keras.optimizers.Adam(0.001)
    else:
        optimizer = keras.optimizers.legacy.SGD(0.05)
    compression = DLSCompressor(density=0.05, **SPARSE)
    model = compiled(compression, optimizer)
    model.fit(*data(32), 16, epochs=2, verbose=0)
    assert compression.last_step().step == 4
    assert_same_on_all_ranks(flat(model))


def test_backward_passes_per_step():
    compression = DLSCompressor(density=0.05, **SPARSE)
    model = compiled(compression, backward_passes_per_step=2, average_aggregated_gradients=True)
    model.fit(*data(64), 16, epochs=2, verbose=0)
    assert compression.last_step().step == 4
    assert_same_on_all_ranks(flat(model))


def test_density_one_is_dense():
    trained = []
    for compression in (hvd.Compression.none, DLSCompressor(density=1, **SPARSE)):
        model = compiled(compression)
        model.fit(*data(32), 16, epochs=2, verbose=0, shuffle=False)
        trained.append(flat(model))
    np.testing.assert_allclose(*trained, rtol=1e-5, atol=1e-6)


def test_custom_loop_with_tape():
    import horovod.tensorflow as hvd_tf

    model, optimizer = net(keras), keras.optimizers.SGD(0.05)
    compression = DLSCompressor(model.trainable_variables, density=0.05, **SPARSE)

    @tf.function
    def step(images, labels):
        with tf.GradientTape() as tape:
            losses = keras.losses.sparse_categorical_crossentropy(labels, model(images))
            loss = tf.reduce_mean(losses)
        tape = hvd_tf.DistributedGradientTape(tape, compression=compression)
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))

    for number in range(4):
        step(*data(16, number))
    assert compression.last_step().step == 4
    assert_same_on_all_ranks(flat(model))


def test_train_on_batch_and_two_models_of_the_same_shapes():
    compressions = [DLSCompressor(density=0.05, **SPARSE) for _ in range(2)]
    models = [compiled(compression, seed=i) for i, compression in enumerate(compressions)]
    for number in range(3):
        for model in models:
            model.train_on_batch(*data(16, number))
    for model, compression in zip(models, compressions, strict=True):
        assert compression.last_step().step == 3
        assert_same_on_all_ranks(flat(model))
    shared = DLSCompressor(density=0.05, **SPARSE)
    first, second = (compiled(shared, seed=i) for i in range(2))
    first.train_on_batch(*data(16, 0))
    with pytest.raises(tf.errors.InvalidArgumentError, match="an instance of its own"):
        second.train_on_batch(*data(16, 0))


def test_a_training_goes_on_from_a_checkpoint_bit_for_bit():
    folder = horovod.broadcast_object(
        tempfile.mkdtemp() if hvd.rank() == 0 else None, name="folder"
    )
    images, labels = data()

    def train(compression, seed, last, *used, first=0, model=None):
        model = model or compiled(compression, seed=seed)
        used = [hvd.callbacks.BroadcastGlobalVariablesCallback(0), *used]
        model.fit(
            images, labels, 8, epochs=last, initial_epoch=first, shuffle=False, verbose=0,
            callbacks=used,
        )  # fmt: skip
        return model

    def compressor():
        return DLSCompressor(density=0.05, warmup_steps=6, **SPARSE)

    expected = train(compressor(), 1, 4)
    compression = compressor()
    train(compression, 1, 2, callbacks.CheckpointCallback(folder, compression))
    compression = compressor()
    model = compiled(compression, seed=2)
    first = callbacks.CheckpointCallback(folder, compression).restore(model)
    assert first == 2
    train(compression, 2, 4, first=first, model=model)
    assert np.array_equal(flat(model), flat(expected))
    assert compression.last_step().step == 16


@pytest.mark.parametrize("optimizer", ["SGD", "legacy.SGD"])
def test_elastic_state(optimizer):
    """Horovod's own calls optimizer.variables(), a property by now; more is in test_elastic.py."""
    kind = keras.optimizers.legacy.SGD if optimizer == "legacy.SGD" else keras.optimizers.SGD
    compression = DLSCompressor(density=0.05, **SPARSE)
    model = compiled(compression, kind(0.05, momentum=0.5))
    state = elastic.TensorFlowKerasState(model, compression=compression, epoch=0)
    assert len(state._tracked()) > 2 * len(model.trainable_variables)  # with its momentum
    model.fit(*data(32), 8, verbose=0, shuffle=False)
    state.save()
    saved = flat(model)
    model.fit(*data(32, 1), 8, verbose=0, shuffle=False)
    once = flat(model)
    state.restore()
    np.testing.assert_array_equal(flat(model), saved)
    state.sync()
    model.fit(*data(32, 1), 8, verbose=0, shuffle=False)
    np.testing.assert_array_equal(flat(model), once)
    assert_same_on_all_ranks(once)
