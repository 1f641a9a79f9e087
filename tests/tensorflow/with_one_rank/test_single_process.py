"""One process: Horovod applies gradients as they are, so what cannot hold is not passed over."""

import os
import subprocess
import sys

import horovod.tensorflow as hvd
import numpy as np
import pytest
import tensorflow as tf

from hvd_dls.tensorflow import DLSCompressor
from tests.tensorflow.with_ranks.training import SPARSE, reduced


@pytest.fixture(scope="module", autouse=True)
def horovod():
    hvd.init()
    yield
    hvd.shutdown()


@pytest.fixture(params=["eager", "tf.function"])
def mode(request):
    """How a training step runs."""
    return request.param


@pytest.fixture
def variables():
    return [tf.Variable(tf.zeros([30, 40]), name="w"), tf.Variable(tf.zeros([7]), name="b")]


def gradients_of(variables, poison=None):
    gradients = [np.full(v.shape, 3 + i, np.float32) for i, v in enumerate(variables)]
    if poison is not None:
        gradients[1][2] = poison
    return gradients


@pytest.mark.parametrize("groups", [None, 1])
def test_gradients_are_as_they_are(mode, variables, groups):
    compression = DLSCompressor(density=0.05, **SPARSE)
    for _ in range(3):
        out = reduced(variables, gradients_of(variables), compression, mode, groups=groups)
        for gradient, expected in zip(out, gradients_of(variables), strict=True):
            np.testing.assert_array_equal(gradient.numpy(), expected)
    assert compression.last_step() is None


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.9},
        {"momentum": 0.5, "nesterov": True},
        {"clip_norm": 1},
        {"clip_value": 2},
        {"clip_global_norm": 1},
    ],
    ids=str,
)
def test_what_would_change_gradients_is_refused_in_words(mode, variables, options):
    compression = DLSCompressor(density=0.05, **SPARSE, **options)
    (option, value), *_ = options.items()
    for _ in range(2):
        with pytest.raises(Exception, match=rf"{option}={value}.* one process only"):
            reduced(variables, gradients_of(variables), compression, mode)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
def test_a_gradient_that_is_not_finite_is_an_error(mode, variables, poison, nonfinite):
    compression = DLSCompressor(density=0.05, nonfinite=nonfinite, **SPARSE)

    def step(gradients):
        return reduced(variables, gradients, compression, "eager")

    step = tf.function(step) if mode == "tf.function" else step
    step([*map(tf.constant, gradients_of(variables))])
    expected = {
        "raise": "NonFiniteGradientError: gradient with NaN or Inf in layer 'b' on rank 0",
        "skip": r"layer 'b'[\s\S]*nonfinite='skip' cannot skip this step",
    }
    with pytest.raises(tf.errors.OpError, match=expected[nonfinite]):
        step([*map(tf.constant, gradients_of(variables, poison))])
    step([*map(tf.constant, gradients_of(variables))])


def test_whoever_scales_the_loss_gets_to_see_what_is_not_finite(mode, variables):
    compression = DLSCompressor(density=0.05, loss_scale=lambda: 2.0, **SPARSE)
    out = reduced(variables, gradients_of(variables, np.inf), compression, mode)
    assert np.isinf(out[1].numpy()[2])


def test_plain_tensors_pass(mode):
    x = tf.constant([1.0, 2.0])

    def gradient():
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_sum(x * x)
        tape = hvd.DistributedGradientTape(tape, compression=DLSCompressor())
        return tape.gradient(loss, [x])

    (out,) = (tf.function(gradient) if mode == "tf.function" else gradient)()
    np.testing.assert_array_equal(out.numpy(), [2, 4])


def test_tf_keras():
    """Which has no other way to Horovod: in a process that runs tf_keras."""
    program = """
import horovod.tensorflow.keras as hvd
import numpy as np
import tf_keras
from hvd_dls.tensorflow import DLSCompressor
hvd.init()
def fit(**options):
    model = tf_keras.Sequential([tf_keras.layers.Dense(3)])
    compression = DLSCompressor(density=0.1, **options)
    optimizer = hvd.DistributedOptimizer(tf_keras.optimizers.SGD(0.1), compression=compression)
    model.compile(optimizer, "mse")
    x = np.ones([8, 4], np.float32)
    model.fit(x, np.full([8, 3], np.inf if options else 1.0), verbose=0)
fit()
for options in ({"clip_norm": 1.0}, {"nonfinite": "skip"}):
    try:
        fit(**options)
    except Exception as error:
        assert "one process only" in str(error), error
    else:
        raise AssertionError(options)
print("told")
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, "TF_USE_LEGACY_KERAS": "1"},
    )
    assert done.stdout.strip() == "told", done.stderr
