"""Trains a small convolutional net on scikit-learn's handwritten digits, in a custom loop.

    horovodrun -np 2 python examples/tensorflow2_digits.py --compression dls --density 0.01

An ordinary Horovod script: the one line that switches compression on is marked.
"""

import argparse
import json
import os

import horovod.tensorflow as hvd
import keras
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

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
    parser.add_argument("--lr", type=float, default=0.02, help="learning rate")
    parser.add_argument("--momentum", type=float, default=0.9)
    parser.add_argument("--gradient-predivide-factor", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--no-cuda", action="store_true", help="train on the CPU")
    parser.add_argument("--log-interval", type=int, default=10, help="steps between log lines")
    parser.add_argument("--records", help="file for rank 0's record of each step (JSON lines)")
    return parser.parse_args()


def net():
    """3x3 and 1x1 convolutions, batch norm and two fully connected layers: 172,000 parameters."""
    layers = keras.layers
    as_torch = {
        "kernel_initializer": keras.initializers.VarianceScaling(1 / 3, "fan_in", "uniform")
    }

    def block(channels, kernel):
        return [
            layers.Conv2D(channels, kernel, padding="same", **as_torch),
            layers.BatchNormalization(momentum=0.9, epsilon=1e-5),
            layers.ReLU(),
        ]

    return keras.Sequential(
        [
            layers.Input((8, 8, 1)),
            *block(32, 3), *block(64, 3), *block(32, 1), *block(64, 3), layers.MaxPooling2D(),
            layers.Flatten(), layers.Dense(128, "relu", **as_torch),
            layers.Dropout(0.5), layers.Dense(10, **as_torch),
        ]
    )  # fmt: skip


def datasets():
    images, labels = load_digits(return_X_y=True)
    images = images.astype(np.float32).reshape(-1, 8, 8, 1) / 16
    train, test = train_test_split(
        range(len(labels)), test_size=0.2, random_state=0, stratify=labels
    )
    return (images[train], labels[train]), (images[test], labels[test])


def batches(data, batch_size, seed):
    """This rank's batches of an epoch, in another order each: images shifted as augmentation."""
    generator = np.random.default_rng(seed)  # the same on all ranks
    images, labels = data
    order = generator.permutation(len(labels))[hvd.rank() :: hvd.size()]
    generator = np.random.default_rng([seed, hvd.rank()])
    for first in range(0, len(labels) // hvd.size() - batch_size + 1, batch_size):
        chosen = order[first : first + batch_size]
        moves = generator.integers(-1, 2, (batch_size, 2))
        shifted = [
            np.roll(image, move, (0, 1)) for image, move in zip(images[chosen], moves, strict=True)
        ]
        yield tf.constant(np.stack(shifted)), tf.constant(labels[chosen])


def compressor(args):
    if args.compression == "none":
        return hvd.Compression.none
    if args.compression == "fp16":
        return hvd.Compression.fp16
    # measure_every compares each step with exact global top-k: for the records only.
    return DLSCompressor(
        density=args.density, strategy=args.compression, measure_every=int(bool(args.records))
    )


def record_of(compression, model):
    """One step as a dictionary: what was sent, and how good the choice was."""
    step = compression.last_step() if isinstance(compression, DLSCompressor) else None
    if step is None:
        width = 2 if compression is hvd.Compression.fp16 else 4
        return {"bytes": width * sum(int(np.prod(v.shape)) for v in model.trainable_variables)}
    return {
        "bytes": step.sparse_bytes + step.dense_bytes,
        "k": dict(zip(step.names, step.k.tolist(), strict=True)),
        "thresholds": dict(zip(step.names, step.thresholds.tolist(), strict=True)),
        "spread": step.threshold_spread(),
        "energy": step.quality.energy,
        "misallocation": step.quality.misallocation,
    }


def cross_entropy(logits, labels):
    return keras.losses.categorical_crossentropy(
        tf.one_hot(labels, 10), logits, from_logits=True, label_smoothing=0.1
    )


def accuracy(model, data):
    """Share of test images recognised; each rank looks at its part."""
    images, labels = (part[hvd.rank() :: hvd.size()] for part in data)
    right = (np.argmax(model(images, training=False), 1) == labels).sum()
    total = hvd.allreduce(tf.constant(right), op=hvd.Sum, name="right")
    return int(total) / len(data[1])


def main():
    args = arguments()
    hvd.init()
    gpus = tf.config.list_physical_devices("GPU")
    mine = gpus[hvd.local_rank() : hvd.local_rank() + 1]
    tf.config.set_visible_devices([] if args.no_cuda else mine, "GPU")
    keras.utils.set_random_seed(args.seed + hvd.rank())

    train_data, test_data = datasets()
    model = net()
    compression = compressor(args)
    optimizer = keras.optimizers.SGD(args.lr, args.momentum)

    @tf.function
    def train(images, labels):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(cross_entropy(model(images, training=True), labels))
        tape = hvd.DistributedGradientTape(
            tape,
            compression=compression,  # <- the one line
            gradient_predivide_factor=args.gradient_predivide_factor,
        )
        # Horovod's tape takes TensorFlow's variables: the values of Keras 3's.
        gradients = tape.gradient(loss, [v.value for v in model.trainable_variables])
        optimizer.apply(gradients, model.trainable_variables)
        return loss

    optimizer.build(model.trainable_variables)
    hvd.broadcast_variables([v.value for v in model.weights + optimizer.variables], root_rank=0)

    step, steps = 0, args.epochs * (len(train_data[1]) // hvd.size() // args.batch_size)
    first = hvd.rank() == 0
    with open(args.records if first and args.records else os.devnull, "w") as records:
        for epoch in range(args.epochs):
            for images, labels in batches(train_data, args.batch_size, args.seed + epoch):
                loss = float(train(images, labels))
                step += 1
                if args.records:
                    record = {"step": step, "loss": loss, **record_of(compression, model)}
                    print(json.dumps(record), file=records)
                if first and (step % args.log_interval == 0 or step == steps):
                    print(f"step {step}/{steps} epoch {epoch + 1} loss {loss:.4f}", flush=True)
    score = accuracy(model, test_data)
    if first:
        print(f"test accuracy {score:.4f}", flush=True)


if __name__ == "__main__":
    main()
