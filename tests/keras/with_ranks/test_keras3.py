"""Keras 3 on the TensorFlow backend, with hvd_dls.keras in Horovod's place."""

import os

import numpy as np
import pytest
import tensorflow as tf

if os.environ.get("TF_USE_LEGACY_KERAS") == "1":
    pytest.skip("tf_keras has its own job", allow_module_level=True)

import keras

import hvd_dls.keras as hvd
from hvd_dls.tensorflow import DLSCompressor, binding
from tests.keras.with_ranks.keras3 import (
    COMPRESSIONS,
    compiled,
    compressor,
    dense_and_dls,
    each_compression,
    is_at_step,
    sgd,
    with_compressions,
)
from tests.keras.with_ranks.training import (
    assert_nothing_is_lost,
    assert_same_on_all_ranks,
    by_a_loop_of_our_own,
    by_fit,
    data,
    flat,
    net,
)


@with_compressions("compression", *COMPRESSIONS)
def test_fit_with_a_smaller_last_batch(compression):
    model = compiled(compression)
    model.fit(*data(40), 16, epochs=3, verbose=0)
    assert is_at_step(compression, 9)
    assert_same_on_all_ranks(flat(model))


def test_without_us_ranks_drift_apart():
    """What the tests above would see if gradients were not averaged."""
    model = net(keras)
    model.compile(sgd(), "sparse_categorical_crossentropy")
    model.fit(*data(32), 16, verbose=0)
    with pytest.raises(AssertionError, match="differs from rank"):
        assert_same_on_all_ranks(flat(model))


def test_the_bare_class():
    class Bare(DLSCompressor):
        _default_instance = compressor()

    models = [compiled(Bare, seed=i) for i in range(2)]  # same shapes: each has its own optimizer
    for model in models:
        model.fit(*data(32), 16, epochs=2, verbose=0)
        assert_same_on_all_ranks(flat(model))
    assert [state["step"] for state in Bare.state_dict()["models"]] == [4, 4]
    assert Bare.last_step().names[0].endswith("conv/kernel")


@with_compressions(
    ("compression", "run_eagerly"),
    ("none", True),
    ("fp16", False),
    ("dls", False),
    ("dls", True),
)
def test_train_on_batch(compression, run_eagerly):
    model = compiled(compression, run_eagerly=run_eagerly)
    for number in range(4):
        model.train_on_batch(*data(16, number))
    assert is_at_step(compression, 4)
    assert_same_on_all_ranks(flat(model))


@with_compressions(
    ("compression", "mode", "how"),
    ("none", "tf.function", "apply"),
    ("fp16", "eager", "apply_gradients"),
    ("dls", "eager", "apply_gradients"),
    ("dls", "tf.function", "apply"),
    ("owners", "eager", "apply"),
    ("owners", "tf.function", "apply_gradients"),
)
def test_custom_loop(compression, mode, how):
    model = net(keras)
    optimizer = hvd.DistributedOptimizer(sgd(), compression=compression)
    traces = []

    def step(images, labels):
        traces.append(1)
        with tf.GradientTape() as tape:
            losses = keras.losses.sparse_categorical_crossentropy(labels, model(images))
            loss = tf.reduce_mean(losses)
        gradients = tape.gradient(loss, model.trainable_variables)
        if how == "apply":
            optimizer.apply(gradients, model.trainable_variables)
        else:
            optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))

    run = tf.function(step) if mode == "tf.function" else step
    for number in range(5):
        run(*data(16, number))
    if mode == "tf.function":
        assert len(traces) <= 2
        run(*data(8, 5))
        run(*data(16, 6))
    assert is_at_step(compression, 7 if mode == "tf.function" else 5)
    assert_same_on_all_ranks(flat(model))


@pytest.mark.parametrize(
    ("train", "exchange"),
    [
        (by_fit, "allgather"),
        (by_fit, "sparse_allreduce"),
        (by_a_loop_of_our_own, "allgather"),
    ],
)
def test_nothing_is_lost(train, exchange):
    compression = compressor(density=0.1, exchange=exchange)
    optimizer = hvd.DistributedOptimizer(
        keras.optimizers.SGD(1.0), compression=compression, op=hvd.Sum
    )
    assert_nothing_is_lost(keras, optimizer, compression, train)


@pytest.mark.parametrize("options", [{}, {"op": hvd.Sum}, {"gradient_predivide_factor": 1.5}])
def test_density_one_is_dense(options):
    trained = []
    for compression in (hvd.Compression.none, compressor(density=1)):
        model = compiled(compression, **options)
        model.fit(*data(32), 16, epochs=2, verbose=0, shuffle=False)
        trained.append(flat(model))
    np.testing.assert_allclose(*trained, rtol=1e-4, atol=1e-6)


def test_it_is_one_process_with_all_the_data():
    """Ranks with parts of a batch do what one process does with the whole."""
    parts = [np.random.default_rng(rank).normal(size=(8, 6)) for rank in range(hvd.size())]
    weights = []
    for batch, wrap in (
        (parts[hvd.rank()], hvd.DistributedOptimizer),
        (np.concatenate(parts), lambda o: o),
    ):
        model = keras.Sequential([keras.layers.Input((6,)), keras.layers.Dense(1, use_bias=False)])
        model.set_weights([np.ones((6, 1))])
        model.compile(wrap(sgd()), "mse")
        for _ in range(3):
            model.train_on_batch(batch, batch[:, :1])
        weights.append(flat(model))
    np.testing.assert_allclose(*weights, rtol=1e-5)


@with_compressions(
    ("compression", "policy"),
    ("none", "mixed_float16"),
    ("fp16", "mixed_bfloat16"),
    ("fp16", "bfloat16"),
    ("dls", "mixed_float16"),
    ("dls", "mixed_bfloat16"),
    ("dls", "bfloat16"),
    ("owners", "mixed_float16"),
)
def test_mixed_precision(compression, policy):
    keras.config.set_dtype_policy(policy)
    try:
        model = compiled(compression)
        model.fit(*data(32), 16, epochs=3, verbose=0)
    finally:
        keras.config.set_dtype_policy("float32")
    assert np.isfinite(flat(model)).all()
    assert_same_on_all_ranks(flat(model))


@pytest.mark.parametrize(
    ("policy", "options"),
    [
        ("float32", {"momentum": 0.5, "nonfinite": "skip"}),
        ("mixed_float16", {}),
        ("mixed_float16", {"momentum": 0.5, "nonfinite": "skip"}),
    ],
    ids=str,
)
def test_passes_on_a_device_train_the_same_to_the_bit(policy, options, monkeypatch):
    """With loss scaling, they are in a branch of a condition."""
    trained = []
    keras.config.set_dtype_policy(policy)
    try:
        for there in (False, True):
            monkeypatch.setattr(binding, "stays_on_device", lambda variable, there=there: there)
            model = compiled(compressor(**options), keras.optimizers.SGD(0.05))
            model.fit(*data(32), 16, epochs=3, shuffle=False, verbose=0)
            trained.append(flat(model))
    finally:
        keras.config.set_dtype_policy("float32")
    assert np.isfinite(trained[0]).all()
    assert np.array_equal(*trained)
    assert_same_on_all_ranks(trained[1])


@each_compression
def test_embeddings_and_variables_without_gradient(compression):
    embedding = keras.Variable(np.ones((50, 16)), name="embedding")
    never = keras.Variable(np.ones((40, 40)), name="never")
    out = keras.Variable(np.ones((16, 64)), name="out")
    optimizer = hvd.DistributedOptimizer(sgd(), compression=compression)
    for step in range(3):
        words = np.random.default_rng([step, hvd.rank()]).integers(0, 50, 20)
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.gather(embedding.value, words) @ out.value)
        variables = [embedding, never, out]
        gradients = tape.gradient(loss, [v.value for v in variables])
        assert isinstance(gradients[0], tf.IndexedSlices)
        assert gradients[1] is None
        optimizer.apply(gradients, variables)
    for variable in variables:
        assert_same_on_all_ranks(variable.numpy())


@dense_and_dls
@pytest.mark.skipif(
    "int(os.environ['HVD_DLS_TEST_RANKS']) < 4", reason="needs two process sets of two ranks"
)
def test_process_sets(compression):
    halves = [hvd.add_process_set([0, 1]), hvd.add_process_set([2, 3])]
    model = compiled(compression, process_set=halves[hvd.rank() // 2])
    model.fit(*data(32), 16, epochs=2, verbose=0)
    everyone = hvd.allgather(tf.constant(flat(model)[None]), name="sets").numpy()
    np.testing.assert_array_equal(everyone[0], everyone[1])
    np.testing.assert_array_equal(everyone[2], everyone[3])
    assert not np.array_equal(everyone[0], everyone[2])
    for process_set in halves:
        hvd.remove_process_set(process_set)
