"""A small training with elastic Horovod and TensorFlow; what a test orders ends it.

Arguments: "function" for a tape in tf.function, or "fit" for Keras 3, or for tf_keras where
TF_USE_LEGACY_KERAS=1; and options of DLSCompressor in JSON.  What it tells of its steps is as in
torch_program.py.
"""

import json
import os
import sys
import time
import zlib

import horovod.tensorflow as hvd
import numpy as np
import tensorflow as tf

from hvd_dls.tensorflow import DLSCompressor, elastic
from tests.elastic.worker import die_if, order, say

HOW, OPTIONS = sys.argv[1], json.loads(sys.argv[2])
LEGACY = os.environ.get("TF_USE_LEGACY_KERAS") == "1"
COMMIT = 3  # steps from one commit to the next
RATE = 0.02
PAUSE = 0.05  # seconds between steps: what all steps print is looked through
EPOCH = 5  # steps of an epoch of fit
SHAPES = (tf.TensorSpec((16, 20)), tf.TensorSpec((16, 1)))
COMPRESSION = DLSCompressor(**OPTIONS)

keras = tf.keras
own = {}  # sum of this rank's gradient of the first layer


@tf.custom_gradient
def watched(weights):
    """The same; what their gradient adds up to is kept, or a rank dies as it is ordered."""

    def gradient(dy):
        def look(dy):
            die_if("die in backward")
            own["gradient"] = float(np.sum(dy.numpy(), dtype=np.float64))
            return dy

        return tf.ensure_shape(tf.py_function(look, [dy], dy.dtype), dy.shape)

    return tf.identity(weights), gradient


class First(keras.layers.Layer):
    def build(self, shape):
        self.kernel = self.add_weight(name="kernel", shape=(shape[-1], 50))
        self.built = True

    def call(self, inputs):
        return tf.tanh(inputs @ watched(tf.convert_to_tensor(self.kernel)))


def net():
    keras.utils.set_random_seed(hvd.rank())  # the state's sync makes them equal
    layers = [First(name="first"), keras.layers.Dense(30), keras.layers.Dense(1)]
    model = keras.Sequential(layers)
    model.build((None, 20))
    return model


def batch(step):
    """Another one for every step and rank."""
    x = np.random.default_rng([step, hvd.rank()]).normal(size=(16, 20)).astype(np.float32)
    return x, np.sin(x @ np.linspace(-1, 1, 20))[:, None].astype(np.float32)


def report(state, world, loss):
    """What this rank has of a step that ended; sums are of the first layer."""
    weights = [np.asarray(tf.convert_to_tensor(w)) for w in state.model.trainable_variables]
    (model,) = COMPRESSION.state_dict()["models"]
    (residual,) = (array for name, array in model["residuals"].items() if "first" in name)
    record, size = COMPRESSION.last_step(), hvd.size()
    said = {
        "world": world,
        "step": state.step,
        "rank": hvd.rank(),
        "size": size,
        "rate": RATE,
        "loss": float(loss),
        "weights": zlib.crc32(b"".join(array.tobytes() for array in weights)),
        "sum_of_weights": np.sum(weights[0], dtype=np.float64),
        "sum_of_gradient": own["gradient"],
        # Of a rank alone it may still be on the scale of the ranks before.
        "sum_of_residual": np.sum(residual, dtype=np.float64) * size / model["world_size"],
        "ratios": zlib.crc32(np.asarray(model["ratios"]).tobytes()),
        # A rank alone leaves the compressor out, but with Keras 3.
        "step_of_compressor": model["step"] + state.left_out,
    }
    if record is not None and size > 1:
        said |= {"sent": int(record.k.sum()), "entries": int(record.sizes.sum())}
    say("step", **said)


def ended(state, world, loss):
    """To be called after each step; whether any rank has been ordered to finish."""
    state.step += 1
    if hvd.size() == 1 and (LEGACY or HOW == "function"):
        state.left_out += 1
    report(state, world, loss)
    time.sleep(PAUSE)
    wish = tf.constant(1.0 if order() == "finish" else 0.0)
    return float(hvd.allreduce(wish, op=hvd.Sum, name="finish")) > 0


def new_world():
    return hvd.broadcast_object(f"{time.monotonic()}", name="world")


def with_a_tape(model, optimizer):
    @tf.function
    def step(x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x) - y) ** 2)
        tape = hvd.DistributedGradientTape(tape, compression=COMPRESSION)
        variables = [getattr(v, "value", v) for v in model.trainable_variables]
        gradients = tape.gradient(loss, variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return loss

    @elastic.run
    def train(state):
        world, finished = new_world(), False
        while not finished:
            loss = step(*map(tf.constant, batch(state.step)))
            finished = ended(state, world, loss)
            if state.step % COMMIT == 0:
                state.commit()

    state = elastic.TensorFlowKerasState(model, optimizer, step=0, left_out=0)
    return state, train


def with_fit(model, optimizer):
    if LEGACY:
        import horovod.tensorflow.keras as hvd_keras

        new_state = elastic.TensorFlowKerasState
    else:
        import hvd_dls.keras as hvd_keras

        new_state = hvd_keras.elastic.KerasState
    optimizer = hvd_keras.DistributedOptimizer(optimizer, compression=COMPRESSION)
    model.compile(optimizer, "mse")
    state = new_state(model, batch=0, epoch=0, step=0, left_out=0)

    class Each(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            self.world = new_world()

        def on_train_batch_end(self, batch, logs=None):
            self.model.stop_training = ended(state, self.world, logs["loss"])

    @elastic.run
    def train(state):
        def batches():
            while True:
                yield batch(state.step)

        model.fit(
            tf.data.Dataset.from_generator(batches, output_signature=SHAPES),
            steps_per_epoch=EPOCH,
            epochs=10**6,
            initial_epoch=state.epoch,
            shuffle=False,
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
    model, optimizer = net(), keras.optimizers.SGD(RATE)
    state, train = (with_fit if HOW == "fit" else with_a_tape)(model, optimizer)
    say("start", rank=hvd.rank(), size=hvd.size())
    state.register_reset_callbacks([lambda: say("reset", rank=hvd.rank(), size=hvd.size())])
    train(state)
    say("end", rank=hvd.rank())


main()
