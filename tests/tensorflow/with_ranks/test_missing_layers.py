"""Layers that never arrive, or not in every step."""

import functools
import logging

import horovod.tensorflow as hvd
import numpy as np
import tensorflow as tf

from hvd_dls.tensorflow import DLSCompressor
from tests.tensorflow.with_ranks.training import SPARSE, assert_same_on_all_ranks, whole_numbers


def test_variables_without_gradients_leave_their_share_to_the_others(mode, caplog):
    used = [tf.Variable(tf.zeros([30, 40]), name="a"), tf.Variable(tf.zeros([50, 20]), name="b")]
    sometimes = tf.Variable(tf.zeros([40, 30]), name="sometimes")
    never = tf.Variable(tf.zeros([100, 60]), name="never")
    embedding = tf.Variable(tf.zeros([90, 10]), name="embedding")  # its gradients are sparse
    variables = [*used, sometimes, never, embedding]
    compression = DLSCompressor(variables, density=0.05, **SPARSE)

    def step(among, *wanted):
        with tf.GradientTape() as tape:
            losses = [tf.reduce_sum(v * g) for v, g in zip(among, wanted, strict=True)]
            loss = tf.add_n([tf.reduce_sum(tf.gather(embedding, [1, 2])), *losses])
        tape = hvd.DistributedGradientTape(tape, compression=compression)
        return tape.gradient(loss, variables)

    steps = [functools.partial(step, among) for among in ([*used, sometimes], used)]
    if mode == "tf.function":
        steps = [tf.function(function) for function in steps]

    def train(which, steps_to_make):
        among = [*used, sometimes][: 3 - which]
        for i in steps_to_make:
            gradients = [tf.constant(whole_numbers(v.shape, i)) for v in among]
            *_, nothing, slices = steps[which](*gradients)
            assert nothing is None
            assert isinstance(slices, tf.IndexedSlices)
        record = compression.last_step()
        assert_same_on_all_ranks(record.k)
        return dict(zip(record.names, record.k.tolist(), strict=True))

    def told(name):
        return sum(name in r.message for r in caplog.records if "share" in r.message)

    with caplog.at_level(logging.INFO, "hvd_dls"):
        k = train(0, range(14))
        assert k["a"] + k["b"] + k["sometimes"] == round(0.05 * 3400)
        assert k["never"] == k["embedding"] == 0
        residual = np.array(compression.state_dict()["models"][0]["residuals"]["sometimes"])
        k = train(1, range(14, 28))
        assert k["a"] + k["b"] == round(0.05 * 3400)
        assert k["sometimes"] == 0
        now = compression.state_dict()["models"][0]["residuals"]["sometimes"]
        np.testing.assert_array_equal(now, residual)
        k = train(0, range(28, 31))
        assert k["a"] + k["b"] + k["sometimes"] == round(0.05 * 3400)
        assert k["sometimes"] > 0
    first = hvd.rank() == 0
    assert [told(name) for name in ("never", "sometimes", "'a'")] == [first, 2 * first, 0]
