"""One process trains as several would: the options that change the training hold."""

import functools
import os

import numpy as np
import pytest
import tensorflow as tf

if os.environ.get("TF_USE_LEGACY_KERAS") == "1":
    pytest.skip("needs Keras 3", allow_module_level=True)

import keras

import hvd_dls.keras as hvd
from hvd_dls.tensorflow import DLSCompressor
from tests.keras.with_ranks.training import SPARSE, data, flat, net


@pytest.fixture(scope="module", autouse=True)
def horovod():
    hvd.init()
    assert hvd.size() == 1
    yield
    hvd.shutdown()


def trained(optimizer, eagerly=False):
    model = net(keras)
    model.compile(optimizer, "sparse_categorical_crossentropy", run_eagerly=eagerly)
    model.fit(*data(40), 16, epochs=2, shuffle=False, verbose=0)
    return flat(model)


@functools.cache
def trained_by_keras(**options):
    return trained(keras.optimizers.SGD(0.05, **options))


@pytest.mark.parametrize("compression", ["none", "fp16", "class", "instance", "owners"])
def test_without_such_options_it_is_keras_to_the_bit(compression):
    compression = {
        "none": hvd.Compression.none,
        "fp16": hvd.Compression.fp16,
        "class": DLSCompressor,
        "instance": DLSCompressor(density=0.01, **SPARSE),
        "owners": DLSCompressor(density=0.01, exchange="sparse_allreduce", **SPARSE),
    }[compression]
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.05), compression=compression)
    np.testing.assert_array_equal(trained(optimizer), trained_by_keras())


@pytest.mark.parametrize("eagerly", [False, True])
@pytest.mark.parametrize(
    ("ours", "of_keras"),
    [
        ({"momentum": 0.9}, {"momentum": 0.9}),
        ({"momentum": 0.9, "nesterov": True}, {"momentum": 0.9, "nesterov": True}),
        ({"clip_norm": 0.05}, {"clipnorm": 0.05}),
        ({"clip_value": 0.01}, {"clipvalue": 0.01}),
        ({"clip_norm": 0.05, "momentum": 0.9}, {"clipnorm": 0.05, "momentum": 0.9}),
        ({"clip_norm": 0.05, "clip_global_norm": 1e9}, {"clipnorm": 0.05}),
    ],
    ids=str,
)
def test_clipping_and_momentum_hold(ours, of_keras, eagerly):
    compression = DLSCompressor(density=0.01, **SPARSE, **ours)
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.05), compression=compression)
    weights = trained(optimizer, eagerly)
    expected = trained_by_keras(**of_keras)
    np.testing.assert_allclose(weights, expected, rtol=1e-3, atol=1e-5)
    assert not np.allclose(weights, trained_by_keras(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("eagerly", [False, True])
def test_adam_is_adamw(eagerly):
    compression = DLSCompressor(density=0.01, adam=(0.5, 0.99), **SPARSE)
    sgd = keras.optimizers.SGD(0.003, weight_decay=0.1)
    weights = trained(hvd.DistributedOptimizer(sgd, compression=compression), eagerly)
    of_keras = keras.optimizers.AdamW(0.003, 0.1, 0.5, 0.99, epsilon=1e-8)
    # Gradients in front of batch normalization are mere rounding, which Adam blows up.
    same = np.isclose(weights, trained(of_keras), rtol=1e-3, atol=1e-5)
    assert same.mean() > 0.99


def test_momentum_is_that_of_accumulated_gradients():
    compression = DLSCompressor(density=0.01, momentum=0.9, **SPARSE)
    ours = hvd.DistributedOptimizer(
        keras.optimizers.SGD(0.05, gradient_accumulation_steps=2), compression=compression
    )
    theirs = keras.optimizers.SGD(0.05, momentum=0.9, gradient_accumulation_steps=2)
    np.testing.assert_allclose(trained(ours), trained(theirs), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}], ids=str)
@pytest.mark.parametrize("where", ["kernel", "embedding"])
@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
def test_nonfinite_holds(nonfinite, where, options):
    compression = DLSCompressor(density=0.01, nonfinite=nonfinite, **SPARSE, **options)
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(1.0), compression=compression)
    variables = [
        keras.Variable(np.zeros((50, 16), np.float32), name="embedding"),
        keras.Variable(np.zeros((30, 40), np.float32), name="kernel"),
    ]
    for step in range(3):
        bad = np.float32(np.nan if step == 1 else 1.0)
        rows = tf.fill([3, 16], bad if where == "embedding" else 1.0)
        whole = tf.fill([30, 40], bad if where == "kernel" else 1.0)
        gradients = [tf.IndexedSlices(rows, tf.constant([0, 1, 2]), tf.constant([50, 16])), whole]
        before = [v.numpy() for v in variables]
        if step == 1 and nonfinite == "raise":
            with pytest.raises(tf.errors.OpError, match="NaN or Inf"):
                optimizer.apply(gradients, variables)
        else:
            optimizer.apply(gradients, variables)
        same = [np.array_equal(b, v.numpy()) for b, v in zip(before, variables, strict=True)]
        assert all(same) if step == 1 else not any(same)
    assert all(np.isfinite(v.numpy()).all() for v in variables)
    assert compression.skipped_steps() == (nonfinite == "skip")


def test_mixed_precision():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        compression = DLSCompressor(density=0.01, momentum=0.9, **SPARSE)
        ours = hvd.DistributedOptimizer(keras.optimizers.SGD(0.05), compression=compression)
        weights = trained(ours)
        expected = trained(keras.optimizers.SGD(0.05, momentum=0.9))
    finally:
        keras.config.set_dtype_policy("float32")
    np.testing.assert_allclose(weights, expected, rtol=0.05, atol=1e-2)
