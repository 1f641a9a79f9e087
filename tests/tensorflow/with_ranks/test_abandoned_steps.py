"""Steps can fail at any point, and Horovod can begin anew: nothing is lost.

Many of these would hang if they failed: the job that runs them has a time limit.
"""

import time

import horovod.tensorflow as hvd
import numpy as np
import pytest
import tensorflow as tf

from hvd_dls.tensorflow import DLSCompressor
from tests.restart import restart_horovod
from tests.tensorflow.with_ranks.training import SPARSE, held, held_on_all_ranks, whole_numbers

OWNERS = {"exchange": "sparse_allreduce"}
SHAPES = [(30, 40), (3, 3, 4, 8), (20, 11)]


class Ledger:
    """Steps whose gradients are whole numbers, and what became of them.

    A step can be made to fail on all ranks: before there is any gradient ("forward"), when all
    gradients but one are there ("backward"), or when Horovod has returned all of them ("behind").
    """

    def __init__(self, mode, **options):
        self.variables = [tf.Variable(tf.zeros(shape), name="w") for shape in SHAPES]
        self.out = [tf.Variable(tf.zeros(shape)) for shape in SHAPES]
        self.compression = DLSCompressor(density=0.1, **SPARSE, **options)
        self._fails = None
        self._received = [np.zeros(shape) for shape in SHAPES]
        self._accumulated = [np.zeros(shape) for shape in SHAPES]
        self._run = tf.function(self._gradients) if mode == "tf.function" else self._gradients

    def _fail_if(self, where):
        """A function that hands an array on."""

        def maybe(array):
            if self._fails == where:
                if where == "backward":
                    time.sleep(0.5)  # the other gradients are on their way by then
                raise RuntimeError("broken on purpose")
            return array

        return maybe

    def _gradients(self, *wanted):
        @tf.custom_gradient
        def breakable(x):
            def gradient(upstream):
                out = tf.numpy_function(self._fail_if("backward"), [upstream], tf.float32)
                return tf.ensure_shape(out, x.shape)

            return tf.identity(x), gradient

        one = tf.numpy_function(self._fail_if("forward"), [tf.constant(1.0)], tf.float32)
        wanted = [g * tf.ensure_shape(one, []) for g in wanted]
        first, *others = self.variables
        with tf.GradientTape() as tape:
            losses = [tf.reduce_sum(breakable(first) * wanted[0])]
            losses += [tf.reduce_sum(v * g) for v, g in zip(others, wanted[1:], strict=True)]
            loss = tf.add_n(losses)
        tape = hvd.DistributedGradientTape(tape, compression=self.compression, op=hvd.Sum)
        gradients = tape.gradient(loss, self.variables)
        saved = [out.assign(g) for out, g in zip(self.out, gradients, strict=True)]
        with tf.control_dependencies(saved):
            return tf.numpy_function(self._fail_if("behind"), [one + 0], tf.float32)

    def step(self, step, fails=None):
        """Makes a step; one that fails before its end leaves nothing behind."""
        self._fails = fails
        wanted = [whole_numbers(shape, step) for shape in SHAPES]
        if fails is None:
            self._run(*map(tf.constant, wanted))
        else:
            with pytest.raises((RuntimeError, tf.errors.OpError), match="broken on purpose"):
                self._run(*map(tf.constant, wanted))
        if fails in (None, "behind"):
            for i, shape in enumerate(SHAPES):
                self._received[i] += self.out[i].numpy()
                for rank in range(hvd.size()):
                    self._accumulated[i] += whole_numbers(shape, step, rank)

    def assert_nothing_is_lost(self):
        for i, waits in enumerate(held_on_all_ranks(self.compression).values()):
            total = self._received[i] + waits.reshape(SHAPES[i])
            np.testing.assert_array_equal(total, self._accumulated[i])


@pytest.mark.parametrize(
    ("mode", "options", "fails"),
    [
        ("tf.function", {}, "backward"),
        ("eager", {"bucket_bytes": 1000}, "forward"),
        ("eager", {"bucket_bytes": 1000}, "backward"),
        ("tf.function", {"bucket_bytes": 1000}, "backward"),
        ("tf.function", {"bucket_bytes": 1000}, "behind"),
        ("tf.function", {"bucket_bytes": 1000} | OWNERS, "backward"),
        ("eager", OWNERS, "behind"),
        ("eager", {"dense_steps": 2}, "behind"),
    ],
    ids=str,
)
def test_a_step_that_fails_on_all_ranks(mode, options, fails):
    """As by tf.debugging.assert_..., or because the data have come to their end."""
    ledger = Ledger(mode, **options)
    ledger.step(0)
    for step in range(1, 3):
        before = held(ledger.compression)
        ledger.step(step, fails)
        if fails != "behind":  # a state can be saved, and is that of before the step
            for name, residual in held(ledger.compression).items():
                np.testing.assert_array_equal(residual, before[name])
        ledger.step(10 + step)
        ledger.assert_nothing_is_lost()
    assert ledger.compression.last_step().step == (5 if fails == "behind" else 3)


@pytest.mark.parametrize("options", [{}, {"bucket_bytes": 1000} | OWNERS], ids=["", "owners"])
def test_a_step_can_be_abandoned_by_hand(mode, options):
    ledger = Ledger(mode, **options)
    ledger.step(0)
    ledger.step(1, "backward")
    ledger.compression.abandon_step()
    ledger.compression.abandon_step()  # nothing to do
    ledger.compression.load_state_dict(ledger.compression.state_dict())
    ledger.step(2)
    ledger.assert_nothing_is_lost()


def test_horovod_begun_anew_between_steps(mode):
    ledger = Ledger(mode)
    for step in range(6):
        if step in (2, 4):
            restart_horovod(hvd)
        ledger.step(step)
        ledger.assert_nothing_is_lost()
    assert ledger.compression.last_step().step == 6


def test_horovod_begun_anew_in_the_middle_of_a_step(mode):
    ledger = Ledger(mode)
    ledger.step(0)
    ledger.step(1, "backward")
    restart_horovod(hvd)
    ledger.step(2)
    ledger.assert_nothing_is_lost()
