"""Elastic training with Keras 3 on scikit-learn's digits: workers may come, leave and die.

    horovodrun -np 2 --min-np 1 --host-discovery-script ./discover.sh --network-interface eth0 \
        python examples/keras_elastic.py

discover.sh prints the hosts of the moment with their slots, as "host1:2", one a line.  Names are
those of Horovod's elastic scripts; the lines that differ are marked.
"""

import argparse

import keras
import numpy as np
from sklearn.datasets import load_digits

import hvd_dls.keras as hvd  # in place of horovod.tensorflow.keras
from hvd_dls.tensorflow import DLSCompressor  # and this

COMMIT = 5  # batches from one commit to the next: what is lost at most when a worker dies
BATCH = 32


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--density", type=float, default=0.01, help="share of entries sent a step")
    args = parser.parse_args()

    hvd.init()
    images, labels = load_digits(return_X_y=True)
    images = images.astype(np.float32).reshape(-1, 8, 8, 1) / 16
    layers = keras.layers
    model = keras.Sequential(
        [
            layers.Input((8, 8, 1)),
            layers.Conv2D(32, 3, activation="relu"), layers.Conv2D(32, 3, activation="relu"),
            layers.Flatten(), layers.Dense(64, "relu"), layers.Dense(10, "softmax"),
        ]
    )  # fmt: skip
    optimizer = hvd.DistributedOptimizer(
        keras.optimizers.SGD(0.05),
        compression=DLSCompressor(density=args.density),  # and this
    )
    model.compile(optimizer, "sparse_categorical_crossentropy")
    state = hvd.elastic.KerasState(model, batch=0, epoch=0)
    state.register_reset_callbacks([lambda: say(f"{hvd.size()} workers from now on")])
    train(state, images, labels, args.epochs)


@hvd.elastic.run
def train(state, images, labels, epochs):
    count = len(labels) // hvd.size() // BATCH * BATCH  # as many on every worker
    order = np.random.default_rng(0).permutation(len(labels))
    mine = order[hvd.rank() :: hvd.size()][:count]
    state.model.fit(
        images[mine],
        labels[mine],
        BATCH,
        epochs=epochs,
        initial_epoch=state.epoch,
        verbose=0,
        callbacks=[
            hvd.callbacks.MetricAverageCallback(),
            keras.callbacks.LambdaCallback(on_epoch_end=tell),
            hvd.elastic.UpdateEpochStateCallback(state),
            hvd.elastic.UpdateBatchStateCallback(state),
            hvd.elastic.CommitStateCallback(state, COMMIT),
        ],
    )


def tell(epoch, logs):
    say(f"epoch {epoch + 1}, {hvd.size()} workers, loss {logs['loss']:.3f}")


def say(text):
    if hvd.rank() == 0:
        print(text, flush=True)


if __name__ == "__main__":
    main()
