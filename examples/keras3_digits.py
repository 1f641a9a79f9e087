"""Trains a small net on scikit-learn's handwritten digits with Keras 3 and model.fit.

    horovodrun -np 2 python examples/keras3_digits.py --compression dls --density 0.01

hvd_dls.keras stands where horovod.keras would: Horovod's own does not average with Keras 3.
"""

import argparse

import keras
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import hvd_dls.keras as hvd
from hvd_dls.tensorflow import DLSCompressor


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--compression", choices=["none", "fp16", "layerwise", "dls"], default="dls"
    )
    parser.add_argument("--density", type=float, default=0.01, help="share of entries sent a step")
    parser.add_argument("--batch-size", type=int, default=64, help="training batch size per rank")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--lr", type=float, default=0.02, help="learning rate of all ranks")
    parser.add_argument("--momentum", type=float, default=0.9)
    parser.add_argument("--warmup-epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--no-cuda", action="store_true", help="train on the CPU")
    parser.add_argument("--save", help="file for the trained model (.keras), written by rank 0")
    return parser.parse_args()


def net():
    layers = keras.layers
    return keras.Sequential(
        [
            layers.Input((8, 8, 1)),
            layers.Conv2D(32, 3, padding="same"), layers.BatchNormalization(), layers.ReLU(),
            layers.Conv2D(64, 3, padding="same"), layers.BatchNormalization(), layers.ReLU(),
            layers.MaxPooling2D(), layers.Flatten(),
            layers.Dense(128, "relu"), layers.Dropout(0.5), layers.Dense(10, "softmax"),
        ]
    )  # fmt: skip


def datasets():
    """This rank's part of the training data, and all of the test data."""
    images, labels = load_digits(return_X_y=True)
    images = images.astype(np.float32).reshape(-1, 8, 8, 1) / 16
    train, test = train_test_split(
        range(len(labels)), test_size=0.2, random_state=0, stratify=labels
    )
    size = len(train) // hvd.size()  # as many batches on every rank
    mine = train[hvd.rank() * size : (hvd.rank() + 1) * size]
    return (images[mine], labels[mine]), (images[test], labels[test])


def compressor(args):
    if args.compression in ("none", "fp16"):
        return getattr(hvd.Compression, args.compression)
    return DLSCompressor(density=args.density, strategy=args.compression)


def main():
    args = arguments()
    hvd.init()
    gpus = tf.config.list_physical_devices("GPU")
    mine = gpus[hvd.local_rank() : hvd.local_rank() + 1]
    tf.config.set_visible_devices([] if args.no_cuda else mine, "GPU")
    keras.utils.set_random_seed(args.seed + hvd.rank())

    train_data, test_data = datasets()
    model = net()
    optimizer = hvd.DistributedOptimizer(
        keras.optimizers.SGD(args.lr, args.momentum),
        compression=compressor(args),  # <- the one line
    )
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
    model.fit(
        *train_data,
        args.batch_size,
        args.epochs,
        validation_data=test_data,
        verbose=2 if hvd.rank() == 0 else 0,
        callbacks=[
            hvd.callbacks.BroadcastGlobalVariablesCallback(0),
            hvd.callbacks.MetricAverageCallback(),
            hvd.callbacks.LearningRateWarmupCallback(args.lr, args.warmup_epochs, verbose=1),
        ],
    )
    if hvd.rank() == 0:
        _, score = model.evaluate(*test_data, verbose=0)
        print(f"test accuracy {score:.4f}", flush=True)
        if args.save:
            model.save(args.save)  # anyone can load it, without Horovod


if __name__ == "__main__":
    main()
