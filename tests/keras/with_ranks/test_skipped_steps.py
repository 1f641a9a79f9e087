"""NaN and Inf on one rank: the step is refused or skipped on all, also under loss scaling."""

import os

import numpy as np
import pytest
import tensorflow as tf

if os.environ.get("TF_USE_LEGACY_KERAS") == "1":
    pytest.skip("tf_keras has its own job", allow_module_level=True)

import keras

import hvd_dls.keras as hvd
from hvd_dls.tensorflow import DLSCompressor
from tests.keras.with_ranks.keras3 import compiled, compressor, each_compression, is_at_step, sgd
from tests.keras.with_ranks.training import SPARSE, assert_same_on_all_ranks, data, flat, net


@each_compression
def test_an_overflow_on_one_rank_skips_the_step_on_all(compression):
    inner = keras.optimizers.LossScaleOptimizer(sgd(), initial_scale=8.0)
    optimizer = hvd.DistributedOptimizer(inner, compression=compression)
    variable = keras.Variable(np.ones((30, 40)))
    for step in range(4):
        gradient = np.full((30, 40), 8.0, np.float32)
        if step == 1 and hvd.rank() == 1:
            gradient[3, 4] = np.inf
        before = variable.numpy()
        optimizer.apply([tf.constant(gradient)], [variable])
        assert np.array_equal(before, variable.numpy()) == (step == 1)
    assert float(optimizer.dynamic_scale.numpy()) == 4.0
    assert is_at_step(compression, 3)
    assert_same_on_all_ranks(variable.numpy())


def test_residuals_follow_the_loss_scale():
    """Training is what it is without loss scaling, to the bit."""
    compressions = [DLSCompressor(density=0.1, **SPARSE) for _ in range(2)]
    scaled = keras.optimizers.LossScaleOptimizer(sgd(), initial_scale=16.0, dynamic_growth_steps=2)
    optimizers = [
        hvd.DistributedOptimizer(inner, compression=compression)
        for inner, compression in zip([sgd(), scaled], compressions, strict=True)
    ]
    variables = [keras.Variable(np.ones((30, 40))) for _ in optimizers]
    for step in range(7):
        drawn = np.random.default_rng([step, hvd.rank()]).integers(-50, 51, (30, 40))
        scale = float(optimizers[1].dynamic_scale.numpy()) if step else 16.0
        for optimizer, variable, factor in zip(optimizers, variables, [1.0, scale], strict=True):
            gradient = tf.constant(drawn.astype(np.float32) * factor)
            optimizer.apply([gradient], [variable])
        np.testing.assert_array_equal(variables[0].numpy(), variables[1].numpy())
    assert scale > 16
    assert_same_on_all_ranks(variables[1].numpy())


@pytest.mark.parametrize("eager", [True, False])
def test_a_skipped_step_changes_nothing(eager):
    compression = compressor(nonfinite="skip")
    optimizer = keras.optimizers.SGD(0.1, momentum=0.9, weight_decay=0.1)
    model = net(keras)
    model.compile(
        hvd.DistributedOptimizer(optimizer, compression=compression),
        "sparse_categorical_crossentropy",
        run_eagerly=eager,
    )
    model.train_on_batch(*data(16, 0))
    state = [*model.trainable_variables, *model.optimizer.variables]
    before = [np.asarray(v).tobytes() for v in state]
    images, labels = data(16, 1)
    if hvd.rank() == 1:
        images[0] = np.nan
    model.train_on_batch(images, labels)
    assert [np.asarray(v).tobytes() for v in state] == before
    model.get_layer("batch_normalization").moving_mean.assign(np.zeros(8))
    model.get_layer("batch_normalization").moving_variance.assign(np.ones(8))
    model.train_on_batch(*data(16, 2))
    assert [np.asarray(v).tobytes() for v in state] != before
    assert np.isfinite(flat(model)).all()
    assert is_at_step(compression, 2)
    assert compression.skipped_steps() == 1
    assert_same_on_all_ranks(flat(model))


def test_embeddings_alone_train_with_skipping():
    embedding = keras.Variable(np.ones((50, 16)), name="embedding")
    optimizer = hvd.DistributedOptimizer(sgd(), compression=compressor(nonfinite="skip"))
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(tf.gather(embedding.value, [1, 2]))
    optimizer.apply(tape.gradient(loss, [embedding.value]), [embedding])
    assert not np.array_equal(embedding.numpy(), np.ones((50, 16)))
    assert_same_on_all_ranks(embedding.numpy())


def test_nan_moves_no_weight_on_any_rank():
    model = compiled(compressor())
    model.train_on_batch(*data(16, 0))
    before = flat(model)
    images, labels = data(16, 1)
    if hvd.rank() == 1:
        images[0] = np.nan
    with pytest.raises(tf.errors.OpError, match=r"NaN or Inf in .* on rank 1"):
        model.train_on_batch(images, labels)
    np.testing.assert_array_equal(flat(model), before)
