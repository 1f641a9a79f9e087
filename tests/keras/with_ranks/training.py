"""Models, data and comparisons that the tests on several ranks share, for Keras 2 and 3."""

from __future__ import annotations

import horovod.tensorflow as hvd
import numpy as np
import tensorflow as tf

from tests.tensorflow.with_ranks.training import held_on_all_ranks

# Layers are small here: nothing but vectors goes dense unless a test wants it to.
SPARSE = {"cost_rule": False, "dense_below": 0}


def net(keras, seed=1):
    """A convolution, batch norm and fully connected layers."""
    if keras.__name__.startswith("tf_keras"):
        keras.backend.clear_session()
    else:  # without looking for garbage, which takes 0.1 s among all that TensorFlow is
        keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(seed)
    layers = keras.layers
    return keras.Sequential(
        [
            layers.Input((4, 4, 3)),
            layers.Conv2D(8, 3, padding="same", name="conv"),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.Flatten(),
            layers.Dense(32, "relu", name="hidden"),
            layers.Dense(5, "softmax", name="out"),
        ]
    )


def data(size=32, seed=0):
    """Other images and labels on every rank."""
    generator = np.random.default_rng([seed, hvd.rank()])
    images = generator.normal(size=(size, 4, 4, 3)).astype(np.float32)
    return images, generator.integers(0, 5, size)


def flat(model) -> np.ndarray:
    """Trainable weights; batch norm's moving averages differ between ranks, as in Horovod."""
    weights = [np.asarray(w, np.float64).ravel() for w in model.trainable_variables]
    return np.concatenate(weights)


def assert_same_on_all_ranks(values: np.ndarray) -> None:
    """Bit-identical: compared as bytes."""
    mine = np.ascontiguousarray(values).view(np.uint8).reshape(1, -1)
    everyone = hvd.allgather(tf.constant(mine), name="agreement").numpy()
    for rank, theirs in enumerate(everyone):
        assert np.array_equal(theirs, mine[0]), f"rank {rank} differs from rank {hvd.rank()}"


def assert_nothing_is_lost(keras, optimizer, compression, train) -> None:
    """What was applied, from all ranks, plus what each keeps is what all gradients came to.

    Exactly: the gradients are whole numbers over a power of two.

    Args:
        keras: the Keras to build the model with.
        optimizer: plain gradient descent with a learning rate of 1 that sums over ranks.
        compression: the compressor in it.
        train: called with model, optimizer, loss, inputs and targets; trains for two epochs with
            batches of 8.
    """

    def loss(targets, outputs):  # its gradient is inputs^T targets / batch size
        return tf.reduce_sum(targets * outputs, -1)

    def numbers(seed, width, rank):
        return np.random.default_rng([seed, rank]).integers(-3, 4, (32, width)).astype(np.float32)

    layers = keras.layers
    dense = layers.Dense(30, use_bias=False, kernel_initializer="zeros")
    model = keras.Sequential([layers.Input((12,)), dense])
    train(model, optimizer, loss, numbers(1, 12, hvd.rank()), numbers(2, 30, hvd.rank()))
    (kept,) = held_on_all_ranks(compression).values()
    kept = kept.reshape(12, 30)
    assert np.abs(kept).sum() > 0
    accumulated = sum(
        2 * numbers(1, 12, rank).T @ numbers(2, 30, rank) / 8 for rank in range(hvd.size())
    )
    assert np.array_equal(kept - dense.kernel.numpy(), accumulated)


def by_fit(model, optimizer, loss, inputs, targets):
    model.compile(optimizer, loss)
    model.fit(inputs, targets, 8, epochs=2, verbose=0)


def by_a_loop_of_our_own(model, optimizer, loss, inputs, targets):
    @tf.function
    def step(inputs, targets):
        with tf.GradientTape() as tape:
            value = tf.reduce_mean(loss(targets, model(inputs, training=True)))
        variables = model.trainable_variables
        gradients = tape.gradient(value, [getattr(v, "value", v) for v in variables])
        optimizer.apply_gradients(zip(gradients, variables, strict=True))

    for _ in range(2):
        for first in range(0, 32, 8):
            step(inputs[first : first + 8], targets[first : first + 8])
