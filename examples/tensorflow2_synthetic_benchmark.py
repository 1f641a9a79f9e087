"""Images per second with random images: what compression costs or saves on your network.

    horovodrun -np 2 python examples/tensorflow2_synthetic_benchmark.py --model ResNet50

The flags and output lines are those of Horovod's example of this name, with --compression besides.
Run it once for each compression and compare; on loopback compression is expected to lose.
"""

import argparse
import timeit

import horovod.tensorflow as hvd
import keras
import numpy as np
import tensorflow as tf

from hvd_dls.tensorflow import DLSCompressor


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--compression", choices=["none", "fp16", "layerwise", "dls"], default="dls"
    )
    parser.add_argument("--density", type=float, default=0.01, help="share of entries sent a step")
    parser.add_argument("--model", default="ResNet50", help="a model of keras.applications")
    parser.add_argument("--batch-size", type=int, default=32, help="images per rank and step")
    parser.add_argument("--image-size", type=int, default=224, help="height and width")
    parser.add_argument("--num-warmup-batches", type=int, default=10)
    parser.add_argument("--num-batches-per-iter", type=int, default=10)
    parser.add_argument("--num-iters", type=int, default=10)
    parser.add_argument("--no-cuda", action="store_true", help="train on the CPU")
    return parser.parse_args()


def compressor(args):
    if args.compression in ("none", "fp16"):
        return getattr(hvd.Compression, args.compression)
    return DLSCompressor(density=args.density, strategy=args.compression)


def main():
    args = arguments()
    hvd.init()
    gpus = [] if args.no_cuda else tf.config.list_physical_devices("GPU")
    tf.config.set_visible_devices(gpus[hvd.local_rank() : hvd.local_rank() + 1], "GPU")
    device = "GPU" if gpus else "CPU"

    keras.utils.set_random_seed(0)  # the same weights on every rank
    shape = (args.image_size, args.image_size, 3)
    model = getattr(keras.applications, args.model)(weights=None, input_shape=shape)
    optimizer = keras.optimizers.SGD(0.01)
    compression = compressor(args)
    images = tf.random.uniform([args.batch_size, *shape], seed=hvd.rank())
    labels = tf.random.uniform([args.batch_size], maxval=1000, dtype=tf.int64, seed=hvd.rank())
    weights = [variable.value for variable in model.trainable_variables]

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            scores = model(images, training=True)
            loss = keras.losses.sparse_categorical_crossentropy(labels, scores)
        tape = hvd.DistributedGradientTape(tape, compression=compression)  # <- the one argument
        gradients = tape.gradient(loss, weights)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))

    def log(text):
        if hvd.rank() == 0:
            print(text, flush=True)

    log(f"Model: {args.model}")
    log(f"Batch size: {args.batch_size}")
    log(f"Number of {device}s: {hvd.size()}")
    log("Running warmup...")
    timeit.timeit(step, number=args.num_warmup_batches)
    log("Running benchmark...")
    rates = []
    for i in range(args.num_iters):
        seconds = timeit.timeit(step, number=args.num_batches_per_iter)
        rates.append(args.batch_size * args.num_batches_per_iter / seconds)
        log(f"Iter #{i}: {rates[-1]:.1f} img/sec per {device}")
    mean, confidence = np.mean(rates), 1.96 * np.std(rates)
    log(f"Img/sec per {device}: {mean:.1f} +-{confidence:.1f}")
    total = f"{hvd.size() * mean:.1f} +-{hvd.size() * confidence:.1f}"
    log(f"Total img/sec on {hvd.size()} {device}(s): {total}")


if __name__ == "__main__":
    main()
