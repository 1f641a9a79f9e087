"""Horovod is started anew in the middle of a training, as elastic Horovod does it."""

import os

import numpy as np
import pytest

if os.environ.get("TF_USE_LEGACY_KERAS") == "1":
    pytest.skip("tf_keras has its own job", allow_module_level=True)

import keras

import hvd_dls.keras as hvd
from hvd_dls.tensorflow import DLSCompressor
from tests.keras.with_ranks.training import SPARSE, assert_same_on_all_ranks, data, flat, net
from tests.restart import restart_horovod


@pytest.mark.parametrize("eagerly", [False, True])
@pytest.mark.parametrize("compressed", [False, True])
def test_training_goes_on_as_if_nothing_had_happened(compressed, eagerly):
    trained = []
    for restarts in (False, True):
        compression = hvd.Compression.none
        if compressed:
            compression = DLSCompressor(density=0.05, momentum=0.5, **SPARSE)
        model = net(keras)
        model.compile(
            hvd.DistributedOptimizer(keras.optimizers.SGD(0.05), compression=compression),
            "sparse_categorical_crossentropy",
            run_eagerly=eagerly,
        )
        for step in range(4):
            model.train_on_batch(*data(16, step))
            if restarts and step == 1:
                restart_horovod(hvd)
        if compressed:
            assert compression.last_step().step == 4
        assert_same_on_all_ranks(flat(model))
        trained.append(flat(model))
    np.testing.assert_array_equal(*trained)
