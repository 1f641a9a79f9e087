"""NaN and Inf in IndexedSlices (of embeddings), which do not go through the compressor."""

import os

import numpy as np
import pytest
import tensorflow as tf

if os.environ.get("TF_USE_LEGACY_KERAS") == "1":
    pytest.skip("tf_keras has its own job", allow_module_level=True)

import keras

import hvd_dls.keras as hvd
from hvd_dls.tensorflow import DLSCompressor
from tests.keras.with_ranks.training import SPARSE, assert_same_on_all_ranks

BAD_STEP = 1


def compressor(**options):
    return DLSCompressor(density=0.1, **SPARSE, **options)


def model(embeddings_alone=False):
    variables = [keras.Variable(np.zeros((50, 16)), name="embedding")]
    if not embeddings_alone:
        variables.append(keras.Variable(np.zeros((30, 40)), name="kernel"))
    return variables


def rows(step, rank, scale=1.0):
    """Rank 0's batch uses no row of the embedding at all."""
    generator = np.random.default_rng([step, rank])
    n = 3 if rank else 0
    values = generator.integers(-50, 51, (n, 16)).astype(np.float32) * scale
    indices = generator.permutation(50)[:n].astype(np.int64)
    return values, indices


def whole(step, rank, scale=1.0):
    return (
        np.random.default_rng([step, rank]).integers(-50, 51, (30, 40)).astype(np.float32) * scale
    )


def gradients(step, variables, scale=1.0):
    values, indices = rows(step, hvd.rank(), scale)
    if step == BAD_STEP and hvd.rank() == 1:
        values[1, 2] = np.inf
    sparse = tf.IndexedSlices(tf.constant(values), tf.constant(indices), tf.constant([50, 16]))
    return [sparse, tf.constant(whole(step, hvd.rank(), scale))][: len(variables)]


def applying(optimizer, variables, train):
    """Keras's variables must not be arguments of a traced function."""

    def apply(gradients):
        optimizer.apply(gradients, variables)

    return tf.function(apply) if train == "tf.function" else apply


trains = pytest.mark.parametrize("train", ["eager", "tf.function"])
alone = pytest.mark.parametrize("embeddings_alone", [False, True])


@trains
@alone
def test_loss_scaling_skips_the_step_on_all_ranks_and_loses_nothing(train, embeddings_alone):
    compression = compressor()
    inner = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(1.0), initial_scale=8.0)
    optimizer = hvd.DistributedOptimizer(inner, compression=compression, op=hvd.Sum)
    variables = model(embeddings_alone)
    apply = applying(optimizer, variables, train)
    for step in range(4):
        scale = float(optimizer.dynamic_scale.numpy()) if optimizer.built else 8.0
        before = [v.numpy() for v in variables]
        apply(gradients(step, variables, scale))
        same = [np.array_equal(b, v.numpy()) for b, v in zip(before, variables, strict=True)]
        assert all(same) if step == BAD_STEP else not any(same)
    assert float(optimizer.dynamic_scale.numpy()) == 4.0
    for variable in variables:
        assert_same_on_all_ranks(variable.numpy())
    if embeddings_alone:
        return
    assert compression.skipped_steps() == 1
    assert compression.last_step().step == 3
    (residual,) = compression.state_dict()["models"][0]["residuals"].values()
    kept = hvd.allreduce(tf.constant(residual), op=hvd.Sum, name="kept").numpy().reshape(30, 40)
    accumulated = sum(
        whole(step, rank) for step in range(4) if step != BAD_STEP for rank in range(hvd.size())
    )
    assert np.array_equal(kept / 4.0 - variables[1].numpy(), accumulated)  # of a scaled loss


@trains
@alone
def test_skip_holds_for_them(train, embeddings_alone):
    compression = compressor(nonfinite="skip")
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(1.0), compression=compression)
    variables = model(embeddings_alone)
    apply = applying(optimizer, variables, train)
    for step in range(3):
        before = [v.numpy() for v in variables]
        apply(gradients(step, variables))
        same = [np.array_equal(b, v.numpy()) for b, v in zip(before, variables, strict=True)]
        assert all(same) if step == BAD_STEP else not any(same)
    for variable in variables:
        assert_same_on_all_ranks(variable.numpy())
    assert embeddings_alone or compression.skipped_steps() == 1


@trains
@alone
def test_raise_holds_for_them(train, embeddings_alone):
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(1.0), compression=compressor())
    variables = model(embeddings_alone)
    apply = applying(optimizer, variables, train)
    for step in range(3):
        before = [v.numpy() for v in variables]
        if step == BAD_STEP:
            with pytest.raises(
                tf.errors.OpError, match=r"NaN or Inf in layer 'embedding.*on rank 1"
            ):
                apply(gradients(step, variables))
        else:
            apply(gradients(step, variables))
        same = [np.array_equal(b, v.numpy()) for b, v in zip(before, variables, strict=True)]
        assert all(same) if step == BAD_STEP else not any(same)
    for variable in variables:
        assert_same_on_all_ranks(variable.numpy())


def test_where_nothing_is_compressed_nan_does_not_pass_in_silence():
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(1.0), compression=DLSCompressor())
    bias = keras.Variable(np.zeros(10), name="bias")
    gradient = np.zeros(10, np.float32)
    if hvd.rank() == 1:
        gradient[3] = np.nan
    with pytest.raises(tf.errors.OpError, match="NaN or Inf in layer 'bias'"):
        optimizer.apply([tf.constant(gradient)], [bias])
    np.testing.assert_array_equal(bias.numpy(), 0.0)


def test_skip_holds_for_variables_that_the_compressor_was_not_given():
    ours, other = (keras.Variable(np.zeros((30, 40)), name=name) for name in ("ours", "other"))
    for bad in (ours, other):
        compression = DLSCompressor([ours], density=0.1, nonfinite="skip", **SPARSE)
        optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(1.0), compression=compression)
        for step in range(3):
            gradients = {v: np.ones((30, 40), np.float32) for v in ("other", "ours")}
            if step == BAD_STEP and hvd.rank() == 1:
                gradients[bad.name][3, 4] = np.nan
            before = [ours.numpy(), other.numpy()]
            optimizer.apply([tf.constant(g) for g in gradients.values()], [other, ours])
            same = [np.array_equal(*pair) for pair in zip(before, (ours, other), strict=True)]
            assert all(same) if step == BAD_STEP else not any(same)
        assert compression.skipped_steps() == 1
    assert_same_on_all_ranks(other.numpy())


def test_an_error_of_a_tensor_keeps_no_rank_waiting_for_embeddings():
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(1.0), compression=compressor())
    variables = model()
    apply = applying(optimizer, variables, "tf.function")
    for step in range(6):
        values, indices = rows(step, hvd.rank())
        sparse = tf.IndexedSlices(tf.constant(values), tf.constant(indices), tf.constant([50, 16]))
        kernel = whole(step, hvd.rank())
        if step % 2 and hvd.rank() == 1:
            kernel[3, 4] = np.nan
        if step % 2:
            with pytest.raises(tf.errors.OpError, match=r"NaN or Inf in layer 'kernel.*on rank 1"):
                apply([sparse, tf.constant(kernel)])
        else:
            apply([sparse, tf.constant(kernel)])
    for variable in variables:
        assert_same_on_all_ranks(variable.numpy())
