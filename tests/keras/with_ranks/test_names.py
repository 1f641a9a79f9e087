"""Nothing depends on what one rank alone has made before: it trains as plain Horovod would.

Keras numbers layers through in each process, so after that names differ between ranks.
"""

import os

import numpy as np
import pytest
import tensorflow as tf

if os.environ.get("TF_USE_LEGACY_KERAS") == "1":
    pytest.skip("tf_keras has its own job", allow_module_level=True)

import keras

import hvd_dls.keras as hvd
from tests.keras.with_ranks.keras3 import dense_and_dls
from tests.keras.with_ranks.training import assert_same_on_all_ranks, flat


def automatic_net(words=False):
    """Layers get the names that Keras finds for them."""
    layers = keras.layers
    first = [layers.Embedding(30, 8), layers.Flatten()] if words else [layers.Dense(30)]
    return keras.Sequential([layers.Input((6,)), *first, layers.Dense(5, "softmax")])


def train(model, optimizer, words=False):
    model.compile(optimizer, "sparse_categorical_crossentropy")
    generator = np.random.default_rng(hvd.rank())
    inputs = generator.integers(0, 30, (40, 6)) if words else generator.normal(size=(40, 6))
    model.fit(inputs, generator.integers(0, 5, 40), 16, epochs=2, verbose=0)
    assert_same_on_all_ranks(flat(model))


@dense_and_dls
def test_an_extra_model_on_one_rank(compression):
    if hvd.rank() == 1:
        keras.Sequential([keras.layers.Input((4,)), keras.layers.Dense(3)])
    keras.utils.set_random_seed(1)
    model = automatic_net()
    path = model.trainable_variables[0].path
    assert (hvd.broadcast_object(path, 0) == path) == (hvd.rank() != 1)
    train(model, hvd.DistributedOptimizer(keras.optimizers.SGD(0.1), compression=compression))


@dense_and_dls
def test_an_extra_model_on_one_rank_before_embeddings(compression):
    if hvd.rank() == 1:
        automatic_net(words=True)
    keras.utils.set_random_seed(1)
    model = automatic_net(words=True)
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1), compression=compression)
    train(model, optimizer, words=True)


@dense_and_dls
def test_an_extra_optimizer_on_one_rank(compression):
    """Made, or even used by this rank alone in a process set of its own."""
    alone = hvd.add_process_set([1])
    if hvd.rank() == 1:
        hvd.DistributedOptimizer(keras.optimizers.SGD(0.1))
        probe = hvd.DistributedOptimizer(
            keras.optimizers.SGD(0.1), compression=compression, process_set=alone
        )
        probe.apply([tf.ones((30, 40))], [keras.Variable(np.ones((30, 40)))])
    keras.utils.set_random_seed(1)
    model = automatic_net()
    train(model, hvd.DistributedOptimizer(keras.optimizers.SGD(0.1), compression=compression))
    hvd.remove_process_set(alone)


@dense_and_dls
def test_two_optimizers_in_one_function_do_not_mix(compression):
    """With one name, Horovod could give one model the gradients of the other."""
    variables = [[keras.Variable(np.zeros((30, 40)))] for _ in range(2)]
    optimizers = [
        hvd.DistributedOptimizer(
            keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(1.0), initial_scale=1.0),
            compression=compression,
        )
        for _ in variables
    ]

    @tf.function
    def step(first, second):
        optimizers[0].apply([first], variables[0])
        optimizers[1].apply([second], variables[1])

    for _ in range(5):
        step(tf.ones((30, 40)), tf.fill((30, 40), -2.0))
    for (variable,), sign in zip(variables, (-1, 1), strict=True):
        assert (sign * variable.numpy() >= 0).all()
        assert np.abs(variable.numpy()).sum() > 0
        assert_same_on_all_ranks(variable.numpy())
