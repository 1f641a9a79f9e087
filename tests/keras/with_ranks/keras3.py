"""Keras 3's models and what compresses their gradients, for the tests on several ranks."""

import keras
import pytest

import hvd_dls.keras as hvd
from hvd_dls.tensorflow import DLSCompressor
from tests.keras.with_ranks.training import SPARSE, net


def compressor(variables=None, density=0.05, **options):
    return DLSCompressor(variables, density=density, **SPARSE, **options)


COMPRESSIONS = {
    "none": lambda: hvd.Compression.none,
    "fp16": lambda: hvd.Compression.fp16,
    "dls": compressor,
    "owners": lambda: compressor(exchange="sparse_allreduce"),
}


def with_compressions(names, *others):
    """Parametrizes a test's ``compression``, and what else ``names`` says, by such cases."""
    return pytest.mark.parametrize(names, others, indirect=["compression"])


# For what can differ between them; other tests have each of them in some case.
each_compression = with_compressions("compression", "none", "fp16", "dls")
dense_and_dls = with_compressions("compression", "none", "dls")


def sgd():
    return keras.optimizers.SGD(0.05, momentum=0.9)


def compiled(compression, optimizer=None, seed=1, run_eagerly=False, **options):
    model = net(keras, seed)
    model.compile(
        hvd.DistributedOptimizer(optimizer or sgd(), compression=compression, **options),
        "sparse_categorical_crossentropy",
        metrics=["accuracy"],
        run_eagerly=run_eagerly,
    )
    return model


def is_at_step(compression, step):
    return not isinstance(compression, DLSCompressor) or compression.last_step().step == step
