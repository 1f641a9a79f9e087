"""States and callbacks of elastic training; real elastic jobs are in tests/elastic."""

import os
from types import SimpleNamespace

import numpy as np
import pytest

if os.environ.get("TF_USE_LEGACY_KERAS") == "1":
    pytest.skip("tf_keras has its own job", allow_module_level=True)

import keras

import hvd_dls.keras as hvd
from hvd_dls import DLSError
from hvd_dls.tensorflow import DLSCompressor
from tests.keras.with_ranks.training import SPARSE, assert_same_on_all_ranks, data, flat, net
from tests.restart import restart_horovod


def compiled(compression, **options):
    model = net(keras)
    optimizer = hvd.DistributedOptimizer(
        keras.optimizers.SGD(0.05, momentum=0.5), compression=compression
    )
    model.compile(optimizer, "sparse_categorical_crossentropy", **options)
    return model


@pytest.mark.parametrize("compressed", [False, True])
def test_training_goes_on_from_what_was_saved(compressed):
    compression = DLSCompressor(density=0.05, **SPARSE) if compressed else hvd.Compression.none
    model = compiled(compression)
    state = hvd.elastic.KerasState(model, compression=compression, epoch=0)
    model.fit(*data(32), 8, verbose=0, shuffle=False)
    state.epoch = 1
    state.save()
    model.fit(*data(32, 1), 8, verbose=0, shuffle=False)
    once = flat(model)
    state.restore()
    assert not np.array_equal(flat(model), once)
    restart_horovod(hvd)
    state.sync()
    model.fit(*data(32, 1), 8, verbose=0, shuffle=False)
    np.testing.assert_array_equal(flat(model), once)
    assert_same_on_all_ranks(once)
    assert state.epoch == 1


@pytest.mark.parametrize("goes_on", ["epochs=3 - done", "initial_epoch=done"])
def test_epochs_are_counted_over_all_fits(goes_on):
    state = SimpleNamespace(epoch=0, batch=0)
    commits = []
    state.commit = lambda: commits.append((state.epoch, state.batch))
    model = compiled(hvd.Compression.none)
    callbacks = [
        hvd.elastic.UpdateEpochStateCallback(state),
        hvd.elastic.UpdateBatchStateCallback(state),
        hvd.elastic.CommitStateCallback(state, 2),
    ]
    for until in (1, 3):
        given = {"epochs": until - state.epoch}
        if goes_on.startswith("initial"):
            given = {"epochs": until, "initial_epoch": state.epoch}
        model.fit(*data(32), 8, verbose=0, callbacks=callbacks, **given)
        assert state.epoch == until
    assert commits == [c for epoch in range(3) for c in ((epoch, 1), (epoch, 3), (epoch + 1, 0))]


def test_fit_that_looks_for_nan_goes_on_beside_a_newcomer_that_traces(monkeypatch):
    """All look before they exchange anything; the newcomer compares notes before it looks."""

    def started():
        compression = DLSCompressor(density=0.05, nonfinite="skip", **SPARSE)
        model = compiled(compression)
        return model, compression, hvd.elastic.KerasState(model, compression=compression)

    monkeypatch.setenv("HOROVOD_ELASTIC", "1")
    model, compression, state = started()
    model.fit(*data(32), 8, verbose=0, shuffle=False)
    monkeypatch.delenv("HOROVOD_ELASTIC")  # horovodrun would be asked for a rank in a new job
    restart_horovod(hvd)
    monkeypatch.setenv("HOROVOD_ELASTIC", "1")
    if hvd.rank() == 1:
        model, compression, state = started()
    state.sync()
    model.fit(*data(32, 1), 8, verbose=0, shuffle=False)
    assert compression.last_step().step == 8
    assert_same_on_all_ranks(flat(model))


def test_what_a_state_needs():
    with pytest.raises(ValueError, match="must be built first"):
        hvd.elastic.KerasState(keras.Sequential([keras.layers.Dense(1)]))
    with pytest.raises(DLSError, match="the model has no optimizer"):
        hvd.elastic.KerasState(net(keras))
