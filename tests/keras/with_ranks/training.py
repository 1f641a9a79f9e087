"""Models, data and comparisons that the tests on several ranks share, for Keras 2 and 3."""

from __future__ import annotations

import horovod.tensorflow as hvd
import numpy as np
import tensorflow as tf

# Layers are small here: nothing but vectors goes dense unless a test wants it to.
SPARSE = {"cost_rule": False, "dense_below": 0}


def net(keras, seed=1):
    """A convolution, batch norm and fully connected layers."""
    keras.backend.clear_session()
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
