"""The wrapped optimizer: how it is saved and loaded, and what it refuses."""

import os

import numpy as np
import pytest
import tensorflow as tf

if os.environ.get("TF_USE_LEGACY_KERAS") == "1":
    pytest.skip("tf_keras has its own job", allow_module_level=True)

import keras

import hvd_dls.keras as hvd
from hvd_dls import DLSError
from hvd_dls.tensorflow import DLSCompressor
from tests.keras.with_ranks.keras3 import compiled, compressor, sgd
from tests.keras.with_ranks.training import assert_same_on_all_ranks, data, flat, net


@pytest.mark.parametrize("theirs", ["momentum", "beta_1"])
def test_momentum_in_both_is_refused(theirs):
    kind = keras.optimizers.SGD if theirs == "momentum" else keras.optimizers.Adam
    ours = DLSCompressor(momentum=0.9)
    with pytest.raises(DLSError, match=f"make it with {theirs}=0"):
        hvd.DistributedOptimizer(kind(0.1, **{theirs: 0.9}), compression=ours)
    hvd.DistributedOptimizer(kind(0.1, **{theirs: 0.0}), compression=ours)


@pytest.mark.parametrize(
    ("make", "given"),
    [
        (lambda: keras.optimizers.SGD(0.1, momentum=0.9), "SGD with momentum=0.9"),
        (lambda: keras.optimizers.AdamW(0.1), "AdamW"),
    ],
    ids=["SGD", "AdamW"],
)
def test_adam_needs_plain_sgd(make, given):
    with pytest.raises(DLSError, match=f"plain keras.optimizers.SGD, and it is {given}: make it"):
        hvd.DistributedOptimizer(make(), compression=DLSCompressor(adam=(0.5, 0.999)))


def test_adam_trains_alike_and_refuses_slices():
    def model(sparse_as_dense):
        layers = [keras.Input((1,)), keras.layers.Embedding(40, 30), keras.layers.Dense(2)]
        net = keras.Sequential(layers)
        optimizer = hvd.DistributedOptimizer(
            keras.optimizers.SGD(0.01, weight_decay=0.1),
            compression=compressor(adam=(0.5, 0.999)),
            sparse_as_dense=sparse_as_dense,
        )
        net.compile(optimizer, "mse")
        return net

    words = np.arange(32)[:, None] % 40 + hvd.rank()
    with pytest.raises(Exception, match="sparse_as_dense=True"):
        model(False).fit(words, np.ones((32, 1, 2)), 16, verbose=0)
    trained = model(True)
    hvd.broadcast_variables(trained.variables, root_rank=0)
    trained.fit(words, np.ones((32, 1, 2)), 16, epochs=2, verbose=0)
    assert_same_on_all_ranks(flat(trained))


@pytest.mark.parametrize("compression", [DLSCompressor, DLSCompressor()], ids=["class", "instance"])
def test_clipping_behind_the_exchange_is_told(compression, caplog):
    kind = keras.optimizers.SGD
    hvd.DistributedOptimizer(kind(0.1, global_clipnorm=1.0))
    hvd.DistributedOptimizer(kind(0.1), compression=compression)
    assert not caplog.messages
    hvd.DistributedOptimizer(kind(0.1, global_clipnorm=1.5), compression=compression)
    assert len(caplog.messages) == 1
    assert "global_clipnorm=1.5, which clips sparse sums" in caplog.messages[0]
    assert "give DLSCompressor clip_global_norm=1.5" in caplog.messages[0]


def test_saved_and_loaded_without_horovod_and_trained_on(tmp_path):
    model = compiled(compressor())
    model.fit(*data(32), 16, epochs=2, verbose=0)
    file = str(tmp_path / "model.keras")
    model.save(file)
    plain = keras.saving.load_model(file)
    assert type(plain.optimizer) is keras.optimizers.SGD
    assert "hvd" not in str(plain.get_compile_config())
    for saved, own in zip(plain.optimizer.variables, model.optimizer.variables, strict=True):
        np.testing.assert_array_equal(saved.numpy(), own.numpy())
    again = hvd.load_model(file, compression=compressor())
    assert int(again.optimizer.iterations) == 4
    np.testing.assert_array_equal(
        again.optimizer.variables[2].numpy(), model.optimizer.variables[2].numpy()
    )
    again.fit(*data(32), 16, verbose=0)
    assert int(again.optimizer.iterations) == 6
    assert_same_on_all_ranks(flat(again))


def test_jit_compile_is_off_and_asking_for_it_is_refused(monkeypatch):
    gpu = tf.config.PhysicalDevice("/physical_device:GPU:0", "GPU")
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind=None: [gpu])
    plain = net(keras)
    plain.compile(sgd(), "mse")
    assert plain.jit_compile  # what Keras does where there is a GPU
    model = compiled(compressor())
    assert not model.jit_compile
    with pytest.raises(DLSError, match="XLA"):
        model.compile(model.optimizer, "mse", jit_compile=True)


def test_refusals():
    optimizer = hvd.DistributedOptimizer(sgd())
    with pytest.raises(DLSError, match="already"):
        hvd.DistributedOptimizer(optimizer)
    with pytest.raises(DLSError, match="goes inside"):
        keras.optimizers.LossScaleOptimizer(optimizer)
    with pytest.raises(DLSError, match=r"pass keras.optimizers.get\('sgd'\)"):
        hvd.DistributedOptimizer("sgd")
    with pytest.raises(DLSError, match="no Keras 3 optimizer"):
        hvd.DistributedOptimizer(sgd)
    with pytest.raises(DLSError, match="op="):
        hvd.DistributedOptimizer(sgd(), op=2)
    with pytest.raises(DLSError, match="only with op"):
        hvd.DistributedOptimizer(sgd(), op=hvd.Sum, gradient_predivide_factor=2)


@pytest.mark.parametrize("module", ["horovod.tensorflow", "horovod.keras"])
@pytest.mark.parametrize("compression", [DLSCompressor, DLSCompressor()])
def test_horovods_own_wrapper_refuses_to_train_without_averaging(module, compression):
    import importlib

    horovod = importlib.import_module(module)
    with pytest.raises(DLSError, match=r"hvd_dls\.keras\.DistributedOptimizer"):
        horovod.DistributedOptimizer(sgd(), compression=compression)
