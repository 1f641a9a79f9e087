"""Run on every rank: trains, adds up gradients that are known, and reports what it found."""

import time

import horovod.tensorflow as hvd
import numpy as np
import tensorflow as tf

from hvd_dls.tensorflow import DLSCompressor
from tests.multihost.report import digest, identity, now, report, since
from tests.tensorflow.with_ranks.training import (
    SPARSE,
    Net,
    Trainer,
    flat,
    reduced,
    whole_numbers,
)

STEPS = 5
SHAPES = [(700, 400), (3, 3, 64, 64), (4000,)]


def learn(mode):
    """What the parameters and ratios of a model are after some steps."""
    model = Net()
    before = digest(flat(model))
    compressor = DLSCompressor(density=0.05, **SPARSE)
    Trainer(model, compressor, mode).train(range(10))
    after = digest(flat(model))
    return {"before": before, "after": after, "k": compressor.last_step().k.tolist()}


def barrier(name):
    hvd.allreduce(tf.ones([]), op=hvd.Sum, name=name)


def add_up():
    """Checks that nothing is lost; what that took, and what the compressor says it sent."""
    variables = [tf.Variable(tf.zeros(shape)) for shape in SHAPES]
    compressor = DLSCompressor(variables, density=0.1)
    received = [np.zeros(shape, np.float32) for shape in SHAPES]
    said = {"sparse": 0, "dense": 0}
    barrier("start")
    start = now()
    for step in range(STEPS):
        gradients = [whole_numbers(shape, step) for shape in SHAPES]
        out = reduced(variables, gradients, compressor, "eager", op=hvd.Sum)
        for total, gradient in zip(received, out, strict=True):
            total += gradient.numpy()
        said["sparse"] += compressor.last_step().sparse_bytes
        said["dense"] += compressor.last_step().dense_bytes
    barrier("end")
    took = since(start)
    residuals = list(compressor.state_dict()["models"][0]["residuals"].values())
    assert len(residuals) == 2
    for i, shape in enumerate(SHAPES):
        accumulated = sum(
            whole_numbers(shape, step, rank) for step in range(STEPS) for rank in range(hvd.size())
        )
        kept = np.zeros(shape)
        if i < 2:  # the last one is a vector
            mine = tf.constant(residuals[i].reshape(shape))
            kept = hvd.allreduce(mine, op=hvd.Sum, name=f"kept.{i}").numpy()
            assert np.abs(kept).sum() > 0
        assert np.array_equal(received[i] + kept, accumulated)
    return {"took": took, "said": said, "k": compressor.last_step().k.tolist()}


tf.config.threading.set_intra_op_parallelism_threads(1)
hvd.init()
begun = time.monotonic()
report(
    identity(hvd),
    eager=learn("eager"),
    traced=learn("tf.function"),
    traffic=add_up(),
    seconds=time.monotonic() - begun,
)
hvd.shutdown()
