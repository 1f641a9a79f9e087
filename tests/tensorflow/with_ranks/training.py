"""Models, steps and comparisons that the tests on several ranks share."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import horovod.tensorflow as hvd
import numpy as np
import tensorflow as tf

from hvd_dls.core.wire.dealing import places_of

# Layers are small here: nothing but vectors goes dense unless a test wants it to.
SPARSE = {"cost_rule": False, "dense_below": 0}


class Net(tf.Module):
    """A convolution and fully connected layers; the same weights on every rank."""

    def __init__(self, dtype="float32", seed=1):
        generator = np.random.default_rng(seed)

        def variable(name, *shape):
            return tf.Variable(generator.normal(size=shape) * 0.2, name=name, dtype=dtype)

        self.parameters = [
            variable("conv", 3, 3, 3, 8),
            variable("conv_bias", 8),
            variable("hidden", 8 * 4 * 4, 32),
            variable("hidden_bias", 32),
            variable("out", 32, 5),
            variable("out_bias", 5),
        ]

    def __call__(self, images):
        conv, conv_bias, hidden, hidden_bias, out, out_bias = self.parameters
        x = tf.nn.relu(tf.nn.conv2d(images, conv, 1, "SAME") + conv_bias)
        x = tf.nn.relu(tf.reshape(x, [tf.shape(x)[0], 8 * 4 * 4]) @ hidden + hidden_bias)
        return x @ out + out_bias


def batch(step: int, dtype="float32", size=6):
    """Another batch for every step and rank."""
    generator = np.random.default_rng([step, hvd.rank()])
    images = tf.constant(generator.normal(size=(size, 3, 4, 4)).transpose(0, 2, 3, 1), dtype)
    return images, tf.constant(generator.integers(0, 5, size))


def cross_entropy(logits, labels):
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, tf.cast(logits, tf.float32))
    return tf.reduce_mean(losses)


# AutoGraph takes a third of the time of tracing. It sees our code in the other mode, "eager", where
# Horovod traces.
traced = partial(tf.function, autograph=False)


class Trainer:
    """Plain SGD with Horovod's tape: ``train(steps)``; counts how often its step is traced."""

    def __init__(self, model, compression, mode, lr=0.05, **options):
        self.model = model
        self.traces = 0
        self._options = {"compression": compression, **options}
        self._lr = lr
        self._step = traced(self.step) if mode == "tf.function" else self.step

    def gradients(self, images, labels):
        with tf.GradientTape() as tape:
            loss = cross_entropy(self.model(images), labels)
        tape = hvd.DistributedGradientTape(tape, **self._options)
        return tape.gradient(loss, self.model.parameters)

    def step(self, images, labels):
        self.traces += 1
        for p, g in zip(self.model.parameters, self.gradients(images, labels), strict=True):
            assert g.dtype == p.dtype
            assert g.shape == p.shape
            p.assign_sub(tf.cast(self._lr, p.dtype) * g)

    def train(self, steps, size=6):
        for step in steps:
            self._step(*batch(step, self.model.parameters[0].dtype, size))


def reduced(variables, gradients, compression, mode="tf.function", **options):
    """What Horovod's tape makes of these gradients: of a loss that has them.

    Traced once for the same variables, compression and options, as a training step is.
    """

    def gradient(wanted):
        with tf.GradientTape() as tape:
            loss = tf.add_n(
                [
                    tf.reduce_sum(v * tf.cast(g, v.dtype))
                    for v, g in zip(variables, wanted, strict=True)
                    if g is not None
                ]
            )
        tape = hvd.DistributedGradientTape(tape, compression=compression, **options)
        return tape.gradient(loss, variables)

    if mode != "tf.function":
        return gradient(gradients)
    key = (*map(id, variables), id(compression), *options.items())
    if key not in _traced:
        _traced[key] = traced(gradient)  # holds what the key names, so no id comes again
    return _traced[key]([None if g is None else tf.constant(g) for g in gradients])


_traced: dict[tuple, Callable] = {}


def forget_traced():
    """What ``reduced`` has traced: each test traces its own."""
    _traced.clear()


def flat(model) -> np.ndarray:
    parameters = model.parameters if isinstance(model, Net) else model
    return np.concatenate([tf.cast(p, tf.float64).numpy().ravel() for p in parameters])


def assert_same_on_all_ranks(values: np.ndarray) -> None:
    """Bit-identical: compared as bytes."""
    mine = np.ascontiguousarray(values).view(np.uint8).reshape(1, -1)
    everyone = hvd.allgather(tf.constant(mine), name="agreement").numpy()
    for rank, theirs in enumerate(everyone):
        assert np.array_equal(theirs, mine[0]), f"rank {rank} differs from rank {hvd.rank()}"


def whole_numbers(shape, step: int, rank: int | None = None) -> np.ndarray:
    """A gradient that adds up without rounding: whole numbers, known for every rank."""
    generator = np.random.default_rng([step, hvd.rank() if rank is None else rank])
    return generator.integers(-50, 51, size=tuple(shape)).astype(np.float32)


def held(compression) -> dict[str, np.ndarray]:
    """What this rank holds of each layer, flat: its residual, and what it has kept as an owner."""
    (state,) = compression.state_dict()["models"]
    of_layer = {name: np.array(residual) for name, residual in state["residuals"].items()}
    for key, kept in state.get("kept", {}).items():
        name, piece = key.rsplit("@", 1)
        of_layer[name][places_of(of_layer[name].size, piece)] += kept
    return of_layer


def held_on_all_ranks(compression) -> dict[str, np.ndarray]:
    """Of each layer, flat: the sum of what all ranks hold."""
    return {
        name: hvd.allreduce(tf.constant(own), op=hvd.Sum, name=f"held.{name}").numpy()
        for name, own in held(compression).items()
    }
