"""A small training with elastic Horovod and TensorFlow; what a test orders ends it.

Arguments: "function" or "eagerly" for a tape, or "fit" for Keras 3; and options of DLSCompressor in
JSON, or "dense".
"""

import json
import sys
import time
import zlib

import horovod.tensorflow as hvd
import keras
import numpy as np
import tensorflow as tf

import hvd_dls.keras as hvd_keras
from hvd_dls.tensorflow import DLSCompressor, elastic
from tests.elastic.worker import die_if, order, say

HOW, OPTIONS = sys.argv[1], json.loads(sys.argv[2])
COMMIT = 3  # steps from one commit to the next
PAUSE = 0.05  # seconds between steps: more happens in a job than steps
EPOCH = 5  # steps of an epoch of fit


@tf.custom_gradient
def doomed(x):
    """The same; a rank that is ordered to die does so when the gradient comes by."""

    def gradient(dy):
        def die(dy):
            die_if("die in backward")
            return dy

        return tf.ensure_shape(tf.py_function(die, [dy], dy.dtype), dy.shape)

    return tf.identity(x), gradient


class Doomed(keras.layers.Layer):
    def call(self, inputs):
        return doomed(inputs)


def net():
    keras.utils.set_random_seed(hvd.rank())  # the state's sync makes them equal
    layers = keras.layers
    return keras.Sequential(
        [
            *(layers.Input((20,)), layers.Dense(50, "tanh"), Doomed(), layers.Dense(30)),
            layers.Dense(1),
        ]
    )


def batch(step):
    """Another one for every step and rank."""
    x = np.random.default_rng([step, hvd.rank()]).normal(size=(16, 20)).astype(np.float32)
    return x, np.sin(x @ np.linspace(-1, 1, 20))[:, None].astype(np.float32)


def report(state, size, loss):
    weights = b"".join(np.asarray(w).tobytes() for w in state.model.trainable_variables)
    said = {"step": state.step, "rank": hvd.rank(), "size": size, "loss": float(loss)}
    said["weights"] = zlib.crc32(weights)
    if OPTIONS != "dense":
        (model,) = COMPRESSION.state_dict()["models"]
        said["ratios"] = zlib.crc32(np.asarray(model["ratios"]).tobytes())
        said["compressed"] = model["step"]
        said["waiting"] = float(sum(np.abs(r).sum() for r in model["residuals"].values()))
    say("step", **said)


def finished():
    """Whether any rank has been ordered to finish."""
    wish = tf.constant(1.0 if order() == "finish" else 0.0)
    return float(hvd.allreduce(wish, op=hvd.Sum, name="finish")) > 0


COMPRESSION = hvd.Compression.none if OPTIONS == "dense" else DLSCompressor(**OPTIONS)


def with_a_tape(model, optimizer):
    def step(x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x) - y) ** 2)
        tape = hvd.DistributedGradientTape(tape, compression=COMPRESSION)
        gradients = tape.gradient(loss, [v.value for v in model.trainable_variables])
        optimizer.apply(gradients, model.trainable_variables)
        return loss

    if HOW == "function":
        step = tf.function(step)

    @elastic.run
    def train(state):
        while not finished():
            loss = step(*map(tf.constant, batch(state.step)))
            state.step += 1
            report(state, hvd.size(), loss)
            if state.step % COMMIT == 0:
                state.commit()
            time.sleep(PAUSE)

    state = elastic.TensorFlowKerasState(model, optimizer, step=0)
    return state, train


def with_fit(model, optimizer):
    optimizer = hvd_keras.DistributedOptimizer(optimizer, compression=COMPRESSION)
    model.compile(optimizer, "mse")
    state = hvd_keras.elastic.KerasState(model, batch=0, epoch=0, step=0)

    class Each(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            state.step += 1
            report(state, hvd.size(), logs["loss"])
            self.model.stop_training = finished()
            time.sleep(PAUSE)

    @hvd_keras.elastic.run
    def train(state):
        def batches():
            while True:
                yield batch(state.step)

        shapes = (tf.TensorSpec((16, 20)), tf.TensorSpec((16, 1)))
        data = tf.data.Dataset.from_generator(batches, output_signature=shapes)
        model.fit(
            data,
            steps_per_epoch=EPOCH,
            epochs=10**6 - state.epoch,
            verbose=0,
            callbacks=[
                Each(),
                hvd_keras.elastic.UpdateEpochStateCallback(state),
                hvd_keras.elastic.UpdateBatchStateCallback(state),
                hvd_keras.elastic.CommitStateCallback(state, COMMIT),
            ],
        )

    return state, train


def main():
    hvd.init()
    model, optimizer = net(), keras.optimizers.SGD(0.02, momentum=0.5)
    state, train = (with_fit if HOW == "fit" else with_a_tape)(model, optimizer)
    say("start", rank=hvd.rank(), size=hvd.size())
    state.register_reset_callbacks([lambda: say("reset", rank=hvd.rank(), size=hvd.size())])
    train(state)
    say("end", rank=hvd.rank())


main()
