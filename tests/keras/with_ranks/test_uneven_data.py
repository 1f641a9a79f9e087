"""Ranks with different numbers of batches in ``fit``: see ``hvd_dls.keras.join``."""

import os

import numpy as np
import pytest
import tensorflow as tf

if os.environ.get("TF_USE_LEGACY_KERAS") == "1":
    pytest.skip("tf_keras has no join", allow_module_level=True)

import keras

import hvd_dls.keras as hvd
from hvd_dls import DLSError
from tests.keras.with_ranks.keras3 import compiled, compressor, sgd
from tests.keras.with_ranks.training import assert_same_on_all_ranks, data, flat, net


def count_of(rank, most_on="first"):
    """Batches of an epoch: the last rank, or the first, has none."""
    return 2 * (rank if most_on == "last" else hvd.size() - 1 - rank)


def most():
    return count_of(0)


class Rows(keras.metrics.Metric):
    """Counts the rows that it sees."""

    def __init__(self):
        super().__init__(name="rows")
        self.rows = self.add_weight(shape=(), initializer="zeros", name="rows")

    def update_state(self, y_true, y_pred, sample_weight=None):
        self.rows.assign_add(tf.cast(tf.shape(y_true)[0], tf.float32))

    def result(self):
        return self.rows


def convolution():
    model = net(keras)
    model.get_layer("hidden").kernel_regularizer = keras.regularizers.L2(0.01)
    return model, data(8 * most())


def embedding():
    keras.utils.set_random_seed(1)
    layers = keras.layers
    model = keras.Sequential(
        [layers.Input((4,)), layers.Embedding(50, 16), layers.Flatten(), layers.Dense(5, "softmax")]
    )
    generator = np.random.default_rng(hvd.rank())
    return model, (generator.integers(0, 50, (8 * most(), 4)), generator.integers(0, 5, 8 * most()))


LOSS = "sparse_categorical_crossentropy"


def as_horovod_trains(model, inputs, labels, mine, epochs):
    """With plain Horovod, and gradients of zeros from ranks without data, which do nothing else."""
    optimizer = sgd()
    model.compile(optimizer, LOSS)

    def gradients_of(x, y):
        with tf.GradientTape() as tape:
            loss = model.compute_loss(x, y, model(x, training=True))
        return tape.gradient(loss, [v.value for v in model.trainable_variables])

    for _ in range(epochs):
        for number in range(most()):
            rows = slice(8 * number, 8 * number + 8)
            if number < mine:
                gradients = gradients_of(inputs[rows], labels[rows])
            else:
                gradients = [tf.zeros(v.shape) for v in model.trainable_variables]
            gradients = [
                hvd.allreduce(tf.convert_to_tensor(g), name=f"plain.{i}")
                for i, g in enumerate(gradients)
            ]
            optimizer.apply(gradients, model.trainable_variables)


@pytest.mark.parametrize(
    ("make", "most_on", "known", "options"),
    [
        (convolution, "first", True, {}),
        (convolution, "last", False, {}),
        (convolution, "first", True, {"steps_per_execution": 3}),
        (convolution, "last", False, {"run_eagerly": True}),
        (embedding, "last", True, {}),
    ],
)
def test_density_1_trains_as_horovod_does_with_zeros(make, most_on, known, options):
    mine = count_of(hvd.rank(), most_on)
    model, (inputs, labels) = make()
    as_horovod_trains(model, inputs, labels, mine, epochs=2)
    expected = flat(model)
    others = [v.numpy() for v in model.non_trainable_variables]

    model, _ = make()
    compression = compressor(density=1)
    optimizer = hvd.DistributedOptimizer(sgd(), compression=compression)
    model.compile(optimizer, LOSS, metrics=["accuracy", Rows()], **options)
    dataset = tf.data.Dataset.from_tensor_slices((inputs, labels)).batch(8).take(mine)
    if not known:
        dataset = dataset.filter(lambda x, y: True)
    history = model.fit(hvd.join(model, dataset), epochs=2, verbose=0, shuffle=False).history
    assert compression.last_step().step == 2 * most()
    assert history["rows"] == [8 * mine] * 2
    np.testing.assert_allclose(flat(model), expected, rtol=1e-4, atol=1e-5)
    assert_same_on_all_ranks(flat(model))
    for own, other in zip(model.non_trainable_variables, others, strict=True):
        if own.dtype == "float32":  # not dropout's seeds
            np.testing.assert_allclose(own.numpy(), other, rtol=1e-4, atol=1e-5)
    model.fit(*data(16) if make is convolution else (inputs, labels), batch_size=8, verbose=0)
    assert_same_on_all_ranks(flat(model))  # with data as ever


@pytest.mark.parametrize("passes", [1, 2])
def test_nothing_is_lost_and_what_copies_hold_counts_for_nothing(passes):
    """Sent + residual = accumulated, to the bit; gradients of the template are NaN."""

    def numbers(seed, width, rank):
        generator = np.random.default_rng([seed, rank])
        rows = 8 * (4 if rank == 0 else 3 * (rank == 1))
        return generator.integers(-3, 4, (rows, width)).astype(np.float32)

    def loss(targets, outputs):  # its gradient is inputs^T targets / batch size
        return tf.reduce_sum(targets * outputs, -1)

    dense = keras.layers.Dense(30, use_bias=False, kernel_initializer="zeros")
    model = keras.Sequential([keras.layers.Input((12,)), dense])
    compression = compressor(density=0.1)
    plain = keras.optimizers.SGD(1.0, gradient_accumulation_steps=None if passes == 1 else passes)
    model.compile(hvd.DistributedOptimizer(plain, compression=compression, op=hvd.Sum), loss)
    own = numbers(1, 12, hvd.rank()), numbers(2, 30, hvd.rank())
    dataset = tf.data.Dataset.from_tensor_slices(own).batch(8)
    template = tf.fill([8, 12], np.nan), tf.fill([8, 30], np.nan)
    model.fit(hvd.join(model, dataset, template), epochs=2, verbose=0, shuffle=False)
    (residual,) = compression.state_dict()["models"][0]["residuals"].values()
    kept = hvd.allreduce(tf.constant(residual), op=hvd.Sum, name="kept").numpy().reshape(12, 30)
    accumulated = sum(
        2 * numbers(1, 12, rank).T @ numbers(2, 30, rank) / 8 / passes for rank in range(hvd.size())
    )
    assert np.abs(kept).sum() > 0
    assert np.array_equal(kept - dense.kernel.numpy(), accumulated)
    assert_same_on_all_ranks(flat(model))


def test_what_join_refuses():
    dataset = tf.data.Dataset.from_tensor_slices(data(16)).batch(8)
    model = net(keras)
    with pytest.raises(DLSError, match="compile it"):
        hvd.join(model, dataset)
    model = compiled(compressor())
    with pytest.raises(DLSError, match="from_tensor_slices"):
        hvd.join(model, data(16))
    with pytest.raises(DLSError, match="no batch on any rank"):
        hvd.join(model, dataset.take(0))
    model.compile(model.optimizer, LOSS, steps_per_execution=2)
    with pytest.raises(DLSError, match="steps_per_execution=2"):
        hvd.join(model, dataset.filter(lambda x, y: True))
