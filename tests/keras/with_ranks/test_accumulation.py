"""Keras's gradient accumulation: gradients are exchanged once for each update, not each pass."""

import os

import numpy as np
import pytest
import tensorflow as tf

if os.environ.get("TF_USE_LEGACY_KERAS") == "1":
    pytest.skip("tf_keras has its own job", allow_module_level=True)

import keras

import hvd_dls.keras as hvd
from hvd_dls import DLSError
from hvd_dls.tensorflow import DLSCompressor
from tests.keras.with_ranks.training import (
    SPARSE,
    assert_same_on_all_ranks,
    data,
    flat,
    net,
)

PASSES = 2  # divides without rounding


def compressor(**options):
    return DLSCompressor(**{"density": 0.1, **SPARSE, **options})


def sgd(passes=PASSES, **options):
    return keras.optimizers.SGD(
        **{"learning_rate": 1.0, **options}, gradient_accumulation_steps=passes
    )


def whole_numbers(step, rank, shape=(30, 40)):
    return np.random.default_rng([step, rank]).integers(-50, 51, shape).astype(np.float32)


def applying(optimizer, variable, train):
    """Keras's variables must not be arguments of a traced function."""

    def apply(gradient):
        optimizer.apply([gradient], [variable])

    return tf.function(apply) if train == "tf.function" else apply


def averages(steps, shape=(30, 40)):
    """Of all ranks and of the passes of each update."""
    passes = [
        np.mean([whole_numbers(step, rank, shape) for rank in range(hvd.size())], 0)
        for step in range(steps)
    ]
    return [np.mean(passes[i : i + PASSES], 0) for i in range(0, steps, PASSES)]


@pytest.mark.parametrize("train", ["eager", "tf.function"])
@pytest.mark.parametrize("given", ["gradient_accumulation_steps", "backward_passes_per_step"])
def test_weights_move_by_the_average_of_all_passes_and_ranks(train, given):
    if given == "gradient_accumulation_steps":
        optimizer = hvd.DistributedOptimizer(sgd())
    else:
        optimizer = hvd.DistributedOptimizer(
            sgd(None), backward_passes_per_step=PASSES, average_aggregated_gradients=True
        )
    variable = keras.Variable(np.zeros((30, 40), np.float32))
    apply = applying(optimizer, variable, train)
    seen = [variable.numpy()]
    for step in range(3 * PASSES):
        apply(tf.constant(whole_numbers(step, hvd.rank())))
        seen.append(variable.numpy())
    for number, average in enumerate(averages(3 * PASSES)):
        before, between, after = seen[PASSES * number : PASSES * (number + 1) + 1]
        np.testing.assert_array_equal(before, between)
        np.testing.assert_allclose(before - average, after, rtol=1e-6, atol=1e-5)
    assert_same_on_all_ranks(seen[-1])


def test_nothing_is_lost_and_the_compressor_sees_an_update_once():
    compression = compressor()
    optimizer = hvd.DistributedOptimizer(sgd(), compression=compression, op=hvd.Sum)
    variable = keras.Variable(np.zeros((30, 40), np.float32))
    for step in range(3 * PASSES):
        optimizer.apply([tf.constant(whole_numbers(step, hvd.rank()))], [variable])
    assert compression.last_step().step == 3
    (residual,) = compression.state_dict()["models"][0]["residuals"].values()
    kept = hvd.allreduce(tf.constant(residual), op=hvd.Sum, name="kept").numpy().reshape(30, 40)
    assert np.abs(kept).sum() > 0
    accumulated = hvd.size() * np.sum(averages(3 * PASSES), 0)
    assert np.array_equal(kept - variable.numpy(), accumulated)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("kind", ["SGD", "Adam"])
def test_fit_at_density_one_is_keras_on_all_the_data(kind, compressed):
    """Three passes, whose average is rounded; schedules and Adam count updates, not passes.

    The callback broadcasts behind the first pass, when each rank has accumulated its own.
    """
    parts = [np.random.default_rng(rank).normal(size=(24, 6)) for rank in range(hvd.size())]
    weights = []
    for distributed in (True, False):
        model = keras.Sequential([keras.layers.Input((6,)), keras.layers.Dense(30)])
        model.set_weights([np.full((6, 30), 0.1), np.zeros(30)])
        optimizer = getattr(keras.optimizers, kind)(0.01, gradient_accumulation_steps=3)
        inputs, batch, callbacks = parts[hvd.rank()], 4, []
        if distributed:
            callbacks = [hvd.callbacks.BroadcastGlobalVariablesCallback(0)]
            compression = compressor(density=1) if compressed else hvd.Compression.none
            optimizer = hvd.DistributedOptimizer(optimizer, compression=compression)
        else:
            inputs = np.concatenate(
                [np.concatenate([p[i : i + 4] for p in parts]) for i in range(0, 24, 4)]
            )
            batch = 4 * hvd.size()
        model.compile(optimizer, "mse")
        model.fit(inputs, inputs[:, :1], batch, 2, 0, callbacks=callbacks, shuffle=False)
        assert int(optimizer.iterations) == 4
        weights.append(flat(model))
    np.testing.assert_allclose(*weights, rtol=1e-3, atol=1e-6)


def test_fit_with_dls():
    compression = compressor()
    model = net(keras)
    optimizer = hvd.DistributedOptimizer(sgd(learning_rate=0.05), compression=compression)
    model.compile(optimizer, "sparse_categorical_crossentropy")
    model.fit(*data(40), 10, epochs=3, verbose=0)
    assert compression.last_step().step == 6
    assert_same_on_all_ranks(flat(model))


def test_saved_in_the_middle_of_an_update(tmp_path):
    trained = []
    for stops in (False, True):
        model = net(keras)
        model.compile(
            hvd.DistributedOptimizer(sgd(learning_rate=0.05)), "sparse_categorical_crossentropy"
        )
        for step in range(4):
            if stops and step == 3:
                file = str(tmp_path / "model.keras")
                model.save(file)
                model = hvd.load_model(file)
            model.train_on_batch(*data(16, step))
        trained.append(flat(model))
    np.testing.assert_array_equal(*trained)


def test_embeddings_are_accumulated_as_dense_gradients():
    compression = compressor()
    optimizer = hvd.DistributedOptimizer(sgd(), compression=compression, op=hvd.Sum)
    embedding = keras.Variable(np.zeros((50, 32), np.float32), name="embedding")
    for step in range(2 * PASSES):
        with tf.GradientTape() as tape:
            tape.watch(embedding.value)
            words = tf.constant([step, hvd.rank(), step])
            loss = tf.reduce_sum(tf.gather(embedding.value, words))
        (gradient,) = tape.gradient(loss, [embedding.value])
        assert isinstance(gradient, tf.IndexedSlices)
        optimizer.apply([gradient], [embedding])
    assert compression.last_step().step == 2
    (residual,) = compression.state_dict()["models"][0]["residuals"].values()
    kept = hvd.allreduce(tf.constant(residual), op=hvd.Sum, name="kept").numpy().reshape(50, 32)
    counts = np.zeros((50, 1))
    for rank in range(hvd.size()):
        for step in range(2 * PASSES):
            np.add.at(counts, [step, rank, step], 1 / PASSES)
    assert np.array_equal(kept - embedding.numpy(), np.broadcast_to(counts, (50, 32)))


@pytest.mark.parametrize("train", ["eager", "tf.function"])
def test_a_skipped_update_is_skipped_whole_and_the_next_one_counts_anew(train):
    compression = compressor(density=1, nonfinite="skip")
    optimizer = hvd.DistributedOptimizer(sgd(), compression=compression)
    variable = keras.Variable(np.zeros((30, 40), np.float32))
    apply = applying(optimizer, variable, train)
    for step in range(3 * PASSES):
        gradient = whole_numbers(step, hvd.rank())
        if step == PASSES and hvd.rank() == 1:  # the first pass of the second update
            gradient[3, 4] = np.nan
        apply(tf.constant(gradient))
    first, _, third = averages(3 * PASSES)
    np.testing.assert_allclose(variable.numpy(), -(first + third), rtol=1e-6, atol=1e-5)
    assert compression.skipped_steps() == 1
    assert_same_on_all_ranks(variable.numpy())


def test_an_error_leaves_no_nan_in_the_accumulators():
    optimizer = hvd.DistributedOptimizer(sgd(), compression=compressor())
    variable = keras.Variable(np.zeros((30, 40), np.float32))
    for step in range(2 * PASSES):
        gradient = whole_numbers(step, hvd.rank())
        if step == PASSES and hvd.rank() == 1:
            gradient[3, 4] = np.nan
        if step == 2 * PASSES - 1:
            before = variable.numpy()
            with pytest.raises(tf.errors.OpError, match=r"NaN or Inf in"):
                optimizer.apply([tf.constant(gradient)], [variable])
        else:
            optimizer.apply([tf.constant(gradient)], [variable])
    np.testing.assert_array_equal(variable.numpy(), before)
    for step in range(2):
        optimizer.apply([tf.constant(whole_numbers(step, hvd.rank()))], [variable])
    assert not np.array_equal(variable.numpy(), before)
    assert np.isfinite(variable.numpy()).all()
    assert_same_on_all_ranks(variable.numpy())


@pytest.mark.parametrize("compressed", [False, True])
def test_a_pass_that_overflows_on_one_rank_is_skipped_on_all(compressed):
    """A pass more takes its place."""
    inner = keras.optimizers.LossScaleOptimizer(sgd(), initial_scale=8.0)
    compression = compressor(density=1) if compressed else hvd.Compression.none
    optimizer = hvd.DistributedOptimizer(inner, compression=compression)
    variable = keras.Variable(np.zeros((30, 40), np.float32))
    good = 0
    for bad in (False, True, False, True, False, False):
        scale = float(optimizer.dynamic_scale.numpy()) if optimizer.built else 8.0
        gradient = whole_numbers(good, hvd.rank()) * scale
        if bad and hvd.rank() == 1:
            gradient[3, 4] = np.inf
        good += not bad
        optimizer.apply([tf.constant(gradient)], [variable])
    assert float(optimizer.dynamic_scale.numpy()) == 2.0
    assert int(optimizer.iterations) == 2
    expected = -np.sum(averages(4), 0)
    np.testing.assert_allclose(variable.numpy(), expected, rtol=1e-6, atol=1e-5)
    assert_same_on_all_ranks(variable.numpy())


def test_an_update_that_overflows_when_it_is_sent_is_tried_again():
    """In float16, after all passes went well."""
    inner = keras.optimizers.LossScaleOptimizer(sgd(), initial_scale=2.0**14)
    optimizer = hvd.DistributedOptimizer(inner, compression=hvd.Compression.fp16)
    variable = keras.Variable(np.zeros((30, 40), np.float32))
    good = 0
    while int(optimizer.iterations) < 1:
        scale = float(optimizer.dynamic_scale.numpy()) if optimizer.built else 2.0**14
        optimizer.apply([tf.constant(np.full((30, 40), 8.0 * scale, np.float32))], [variable])
        good += 1
        assert good < 10
    assert good > PASSES
    np.testing.assert_array_equal(variable.numpy(), -8.0)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision(policy):
    compression = compressor()
    keras.config.set_dtype_policy(policy)
    try:
        model = net(keras)
        optimizer = hvd.DistributedOptimizer(sgd(learning_rate=0.05), compression=compression)
        model.compile(optimizer, "sparse_categorical_crossentropy")
        model.fit(*data(64), 16, epochs=2, verbose=0)
    finally:
        keras.config.set_dtype_policy("float32")
    assert compression.last_step().step in (3, 4)
    assert np.isfinite(flat(model)).all()
    assert_same_on_all_ranks(flat(model))


def test_what_keras_cannot_do_is_refused_in_its_words():
    with pytest.raises(DLSError, match="average_aggregated_gradients=True"):
        hvd.DistributedOptimizer(sgd(None), backward_passes_per_step=2)
    with pytest.raises(DLSError, match="gradient_accumulation_steps=2 already"):
        hvd.DistributedOptimizer(
            sgd(2), backward_passes_per_step=2, average_aggregated_gradients=True
        )
    built = sgd(None)
    built.build([keras.Variable(np.zeros(3))])
    with pytest.raises(DLSError, match="make it with gradient_accumulation_steps=2"):
        hvd.DistributedOptimizer(
            built, backward_passes_per_step=2, average_aggregated_gradients=True
        )
    for wrong in (0, 1.5):
        with pytest.raises(DLSError, match="an integer >= 1"):
            hvd.DistributedOptimizer(sgd(None), backward_passes_per_step=wrong)
