"""``hvd_dls.tensorflow.advise``: what it leaves as it was, and what all ranks refuse."""

from __future__ import annotations

import horovod.tensorflow as hvd
import numpy as np
import pytest
import tensorflow as tf

from hvd_dls.advice.candidates import DENSE, FP16
from hvd_dls.errors import DLSError, RanksDisagreeError
from hvd_dls.tensorflow import advise
from hvd_dls.tensorflow.advising import TensorFlowSubject, subject_of_shapes

QUICK = {"seconds": 0.1, "turns": 2, "densities": (0.05,), "quiet": True}


class Model:
    def __init__(self, outputs=96):
        self.trainable_variables = [
            tf.Variable(tf.fill([64, outputs], 0.01), name="weight"),
            tf.Variable(tf.zeros([outputs]), name="bias"),
        ]


def loss_of(model):
    weight, bias = model.trainable_variables
    return tf.reduce_mean((tf.random.normal([8, 64]) @ weight + bias - 1) ** 2)


class PlainSGD:
    def apply_gradients(self, pairs):
        for gradient, variable in pairs:
            variable.assign_sub(0.1 * gradient)


def test_a_script_is_advised_and_its_weights_left_alone():
    model = Model()
    exchanges = ("allgather", "sparse_allreduce")
    advice = advise(model, loss_of, optimizer=PlainSGD, exchanges=exchanges, **QUICK)
    tried = ["dense", "fp16", "dls:0.05", "dls:0.05:sparse_allreduce"]
    assert [row.candidate.name for row in advice.rows] == tried
    dense, _, dls, owners = advice.rows
    ring = 2 * (hvd.size() - 1) / hvd.size()
    assert dense.link_bytes == ring * 4 * (64 * 96 + 96)
    assert max(dls.link_bytes, owners.link_bytes) < dense.link_bytes
    weight, bias = model.trainable_variables
    assert np.all(weight.numpy() == np.float32(0.01))
    assert not np.any(bias.numpy())


@pytest.mark.parametrize("candidate", [DENSE, FP16], ids=lambda each: each.name)
def test_gradients_are_reduced_if_no_optimizer_reads_them(candidate):
    model = Model()
    own = float(hvd.rank() + 1)
    trial = TensorFlowSubject(
        model, lambda model: own * tf.add_n(list(map(tf.reduce_sum, model.trainable_variables)))
    ).trial(candidate)
    trial.step()
    average = (hvd.size() + 1) / 2
    np.testing.assert_allclose(np.asarray(trial._last)[1:], [average, average])


def test_models_that_differ_are_refused_on_all_ranks():
    model = Model(96 + (hvd.rank() == 1))
    with pytest.raises(RanksDisagreeError, match="rank 1 has variable 0"):
        advise(model, loss_of, **QUICK)


def test_a_step_that_fails_on_one_rank_is_refused_on_all():
    def fails(model):
        if hvd.rank() == 1:
            raise KeyError("labels")
        return loss_of(model)

    with pytest.raises(DLSError, match="rank 1: KeyError: 'labels'"):
        advise(Model(), fails, **QUICK)


def test_shapes_are_enough():
    subject = subject_of_shapes([(3, 5), (7,)], 0.001, busy=True)
    assert subject.gradients() == [(15, 4), (7, 4)]
    (shapes,) = (subject._model,)
    with tf.GradientTape() as tape:
        loss = tf.function(shapes, autograph=False)()
    assert [g.shape for g in tape.gradient(loss, shapes.trainable_variables)] == [(3, 5), (7,)]
