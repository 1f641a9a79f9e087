"""Callbacks of hvd_dls.keras do what those of Horovod do."""

import os

import numpy as np
import pytest

if os.environ.get("TF_USE_LEGACY_KERAS") == "1":
    pytest.skip("tf_keras has its own job", allow_module_level=True)

import keras

import hvd_dls.keras as hvd
from hvd_dls.insight.reading import read_run
from tests.keras.with_ranks.keras3 import compiled, compressor
from tests.keras.with_ranks.training import assert_same_on_all_ranks, data, flat


def test_callbacks():
    model = compiled(hvd.Compression.none, seed=hvd.rank())
    seen = []
    history = model.fit(
        *data(32),
        16,
        epochs=3,
        verbose=0,
        callbacks=[
            hvd.callbacks.BroadcastGlobalVariablesCallback(0),
            hvd.callbacks.MetricAverageCallback(),
            hvd.callbacks.LearningRateWarmupCallback(0.08, warmup_epochs=2),
            hvd.callbacks.LearningRateScheduleCallback(0.08, 0.5, start_epoch=2),
            keras.callbacks.LambdaCallback(
                on_train_batch_end=lambda batch, logs: seen.append(
                    float(model.optimizer.learning_rate)
                )
            ),
        ],
    ).history
    assert_same_on_all_ranks(flat(model))
    assert_same_on_all_ranks(np.array(history["loss"]))
    assert_same_on_all_ranks(np.array(history["accuracy"]))
    p = hvd.size()
    warm = [0.08 / p * ((i + 1) / 2 * (p - 1) / 2 + 1) for i in range(4)]
    np.testing.assert_allclose(seen, [*warm, 0.08, 0.08], rtol=1e-6)
    np.testing.assert_allclose(history["lr"], [warm[1], warm[3], 0.08], rtol=1e-6)


def test_broadcast_spares_local_variables_and_takes_optimizer_state():
    model = compiled(hvd.Compression.none, keras.optimizers.Adam(0.01 * (1 + hvd.rank())))
    model.layers[-1].bias.assign(np.full(5, float(hvd.rank())))
    local = model.layers[-1].bias
    callback = hvd.callbacks.BroadcastGlobalVariablesCallback(0, local_variables=local)
    callback.set_model(model)
    callback.on_train_batch_end(0)
    assert float(model.optimizer.learning_rate) == pytest.approx(0.01)
    np.testing.assert_array_equal(local.numpy(), float(hvd.rank()))


def test_momentum_is_corrected_when_the_learning_rate_changes():
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1, momentum=0.5))
    model = keras.Sequential([keras.layers.Input((1,)), keras.layers.Dense(1, use_bias=False)])
    model.compile(optimizer, "mse")
    model.set_weights([np.ones((1, 1))])
    callback = hvd.callbacks.LearningRateScheduleCallback(0.1, lambda epoch: 2.0**epoch)
    x = np.ones((4, 1))
    model.fit(x, 0 * x, 4, epochs=2, verbose=0, callbacks=[callback], shuffle=False)
    v = -0.1 * 2 * 1.0
    w = 1 + v
    v = 0.5 * (0.2 / 0.1) * v - 0.2 * 2 * w
    np.testing.assert_allclose(flat(model), [w + v], rtol=1e-5)


def test_compression_is_seen_beside_keras_own_metrics_and_logged(tmp_path):
    compression = compressor()
    model = compiled(compression)
    path = tmp_path / "{rank}.jsonl"
    callback = hvd.callbacks.InsightCallback(compression, path, every=2)
    history = model.fit(*data(32), 8, epochs=2, verbose=0, callbacks=[callback]).history
    stats = compression.stats(window=4)
    assert len(history["dls_density"]) == 2
    assert history["dls_density"][-1] == pytest.approx(stats.window.density)
    sent = stats.window.sparse_bytes + stats.window.dense_bytes
    assert history["dls_megabytes"][-1] == pytest.approx(sent / 4 / 1e6)
    assert history["dls_dense_megabytes"][-1] > history["dls_megabytes"][-1]
    assert all(ms > 0 for ms in history["dls_ms"])
    (log,) = read_run(tmp_path / f"{hvd.rank()}.jsonl").models
    assert log.steps.tolist() == [1, 2, 4, 6, 8]
