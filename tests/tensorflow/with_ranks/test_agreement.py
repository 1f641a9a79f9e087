"""Ranks whose layers or options differ are told; what makes no difference is not asked for.

Many of these would hang if they failed: the job that runs them has a time limit.
"""

import horovod.tensorflow as hvd
import keras
import numpy as np
import pytest
import tensorflow as tf

from hvd_dls.tensorflow import DLSCompressor
from tests.tensorflow.with_ranks.training import (
    SPARSE,
    Net,
    Trainer,
    assert_same_on_all_ranks,
    batch,
    cross_entropy,
    flat,
    reduced,
)

# Ranks agree in their first step, before anything depends on how it runs: tracing takes its time.
one_way = pytest.mark.parametrize("mode", ["eager"])


def test_a_layer_of_another_width_is_named_on_every_rank(mode):
    width = 40 + min(hvd.rank(), 1)
    variables = [tf.Variable(tf.zeros([9, 30]), name="a"), tf.Variable(tf.zeros([30, width]))]
    gradients = [np.ones(v.shape, np.float32) for v in variables]
    with pytest.raises(Exception, match=r"rank 1 has layer 1: .*\(30, 41\).*rank 0: .*\(30, 40\)"):
        reduced(variables, gradients, DLSCompressor(density=0.1, **SPARSE), mode)
    Trainer(Net(), DLSCompressor(density=0.1, **SPARSE), mode).train(range(2))  # others go on


@one_way
def test_a_layer_more_is_named_on_every_rank(mode):
    variables = [tf.Variable(tf.zeros([30, 40]), name=name) for name in "abc"[: 2 + hvd.rank() % 2]]
    gradients = [np.ones(v.shape, np.float32) for v in variables]
    with pytest.raises(Exception, match=r"rank 1 has number of layers: 3, rank 0: 2"):
        reduced(variables, gradients, DLSCompressor(density=0.1, **SPARSE), mode)


@one_way
def test_options_that_differ_are_named_but_for_a_ranks_own(mode):
    other = DLSCompressor(density=0.1, values=["float32", "float16"][hvd.rank() % 2], **SPARSE)
    with pytest.raises(Exception, match="rank 1 has option values: 'float16', rank 0: 'float32'"):
        Trainer(Net(), other, mode).train(range(1))
    own = DLSCompressor(density=0.1, threads=1 + hvd.rank(), measure_every=hvd.rank(), **SPARSE)
    Trainer(Net(), own, mode).train(range(2))
    assert own.last_step().step == 2


@one_way
def test_a_compressor_that_only_one_rank_makes_does_not_matter(mode):
    model = Net()
    if hvd.rank() == 1:
        probes = [
            DLSCompressor(m, density=0.1, **SPARSE) for m in (model.parameters, Net().parameters)
        ]
        assert all(probe.last_step() is None for probe in probes)
    compression = DLSCompressor(model.parameters, density=0.1, **SPARSE)
    Trainer(model, compression, mode).train(range(3))
    assert compression.last_step().step == 3
    assert_same_on_all_ranks(flat(model))


@one_way
def test_models_may_be_made_in_another_order_on_each_rank(mode):
    made = {}
    for name in ("ab", "ba")[hvd.rank() % 2]:
        model = Net(seed=ord(name))
        made[name] = model, DLSCompressor(model.parameters, density=0.1, **SPARSE)
    for name in "ab":
        model, compression = made[name]
        Trainer(model, compression, mode).train(range(3))
        assert compression.last_step().step == 3
        assert_same_on_all_ranks(flat(model))


def test_a_model_more_on_one_rank_shifts_keras_names_and_nothing_else(mode):
    def make():
        layers = [keras.layers.Dense(30, "relu"), keras.layers.Dense(5)]
        model = keras.Sequential([keras.layers.Flatten(), *layers])
        model.build([None, 4, 4, 3])
        return model

    if hvd.rank() == 1:
        make()
    model = make()
    variables = [v.value for v in model.trainable_variables]
    compression = DLSCompressor(model.trainable_variables, density=0.1, **SPARSE)
    generator = np.random.default_rng(1)  # hvd.broadcast_variables would wait: it goes by names
    for v in variables:
        v.assign(0.2 * generator.normal(size=v.shape))

    def step(images, labels):
        with tf.GradientTape() as tape:
            loss = cross_entropy(model(images), labels)
        tape = hvd.DistributedGradientTape(tape, compression=compression)
        for v, g in zip(variables, tape.gradient(loss, variables), strict=True):
            v.assign_sub(0.05 * g)

    step = tf.function(step) if mode == "tf.function" else step
    for i in range(3):
        step(*batch(i))
    assert compression.last_step().step == 3
    assert compression.last_step().names[0] == model.trainable_variables[0].path  # as users know it
    assert_same_on_all_ranks(flat(variables))
