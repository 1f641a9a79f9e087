"""Names and arguments of horovod.keras and horovod.tensorflow.keras."""

import inspect
import os

import numpy as np
import pytest
import tensorflow as tf

if os.environ.get("TF_USE_LEGACY_KERAS") == "1":
    pytest.skip("tf_keras has its own job", allow_module_level=True)

import horovod.keras
import horovod.tensorflow.keras
import keras

import hvd_dls.keras as hvd
from hvd_dls import DLSError
from hvd_dls.tensorflow import DLSCompressor
from tests.keras.with_ranks.training import SPARSE, assert_same_on_all_ranks, data, flat, net

# What docs/tensorflow.md says that is left out, and the modules that Horovod imports for itself.
LEFT_OUT = {"PartialDistributedOptimizer", "BestModelCheckpoint"}
THEIR_OWN = {"K", "inspect", "is_version_greater_equal_than", "keras", "tf", "version", "warnings"}
THEIRS = [horovod.keras, horovod.tensorflow.keras]


def sgd():
    return keras.optimizers.SGD(0.05, momentum=0.9)


@pytest.mark.parametrize("theirs", THEIRS)
def test_the_same_names(theirs):
    for module, ours in ((theirs, hvd), (theirs.callbacks, hvd.callbacks)):
        names = {name for name in dir(module) if not name.startswith("_")}
        assert names - set(dir(ours)) <= LEFT_OUT | THEIR_OWN


@pytest.mark.parametrize(
    "function", ["DistributedOptimizer", "load_model", "allreduce", "allgather", "broadcast",
                 "reducescatter", "broadcast_global_variables"]
)  # fmt: skip
def test_the_same_arguments_in_the_same_order(function):
    theirs = inspect.signature(getattr(horovod.tensorflow.keras, function)).parameters
    ours = inspect.signature(getattr(hvd, function)).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    for name, parameter in theirs.items():
        assert ours[name].default == parameter.default, name


def test_the_arguments_of_horovods_own_examples():
    model = net(keras)
    optimizer = hvd.DistributedOptimizer(
        sgd(), backward_passes_per_step=1, average_aggregated_gradients=True,
        device_dense="/cpu:0", device_sparse="/cpu:0", num_groups=0, groups=None,
        scale_local_gradients=True,
    )  # fmt: skip
    model.compile(optimizer, "sparse_categorical_crossentropy")
    model.fit(*data(32), 16, verbose=0)
    assert_same_on_all_ranks(flat(model))


@pytest.mark.parametrize(
    ("options", "instead"),
    [
        ({"num_groups": 2}, "HOROVOD_FUSION_THRESHOLD"),
        ({"groups": 2}, "bucket_bytes"),
        ({"scale_local_gradients": False}, "local variables"),
        ({"compression": None}, "DLSCompressor"),
        ({"op": hvd.Adasum}, r"hvd\.Average and hvd\.Sum"),
    ],
)
def test_what_is_not_supported_is_refused_in_words(options, instead):
    with pytest.raises(DLSError, match=instead):
        hvd.DistributedOptimizer(sgd(), **options)


def test_broadcast_variables():
    """Keras calls all these kernels "kernel", and Horovod knows no uint32 and no bfloat16."""
    layers = [
        keras.layers.Dense(3),
        keras.layers.Dense(3, dtype="bfloat16"),
        keras.layers.Dropout(0.5, seed=hvd.rank()),
    ]
    keras.utils.set_random_seed(hvd.rank())
    model = keras.Sequential([keras.layers.Input((3,)), *layers])
    plain = tf.Variable(tf.fill([2], hvd.rank()))
    hvd.broadcast_variables([*model.variables, plain], root_rank=1)
    for variable in [*model.variables, plain]:
        assert_same_on_all_ranks(variable.numpy())
    assert plain.numpy().tolist() == [1, 1]
    hvd.broadcast_variables([], 0)


def test_broadcast_variables_in_a_process_set():
    alone = hvd.add_process_set([1])
    variable = keras.Variable(np.full(3, hvd.rank()))
    if hvd.rank() == 1:
        hvd.broadcast_variables([variable], 1, process_set=alone, inplace=True)
    assert variable.numpy().tolist() == [hvd.rank()] * 3
    hvd.remove_process_set(alone)


def test_broadcast_global_variables_names_the_keras_way():
    with pytest.raises(DLSError, match="BroadcastGlobalVariablesCallback"):
        hvd.broadcast_global_variables(0)


def test_operations_on_values():
    rank, size = hvd.rank(), hvd.size()
    assert int(hvd.allreduce(2 * rank, "value")) == size - 1
    assert float(hvd.allreduce([float(rank)], "average")[0]) == (size - 1) / 2
    assert float(hvd.allreduce(np.float32(rank), op=hvd.Sum, name="sum")) == size * (size - 1) / 2
    assert hvd.allgather([rank], "gather").numpy().tolist() == list(range(size))
    assert int(hvd.broadcast(rank, 1, "broadcast")) == 1
    scattered = hvd.reducescatter(np.ones(2 * size), "scatter", hvd.Sum)
    assert scattered.numpy().tolist() == [size, size]


@pytest.mark.parametrize("compressed", [False, True])
def test_load_model_with_the_options_of_the_optimizer(compressed, tmp_path):
    model = net(keras)
    model.compile(hvd.DistributedOptimizer(sgd()), "sparse_categorical_crossentropy")
    model.fit(*data(32), 16, verbose=0)
    file = str(tmp_path / "model.keras")
    model.save(file)
    alone = [hvd.add_process_set([rank]) for rank in range(hvd.size())]
    compression = DLSCompressor(density=0.1, **SPARSE) if compressed else hvd.Compression.none
    again = hvd.load_model(file, compression=compression, op=hvd.Sum, process_set=alone[hvd.rank()])
    again.fit(*data(32), 16, verbose=0)
    weights = hvd.allgather(flat(again)[None], "weights").numpy()
    assert not np.array_equal(weights[0], weights[1])
    for process_set in alone:
        hvd.remove_process_set(process_set)


class Own(keras.optimizers.SGD):
    """An optimizer of the user's."""


def test_load_model_with_an_optimizer_of_ones_own(tmp_path):
    model = net(keras)
    model.compile(hvd.DistributedOptimizer(Own(0.05)), "sparse_categorical_crossentropy")
    model.fit(*data(32), 16, verbose=0)
    file = str(tmp_path / "model.keras")
    model.save(file)
    again = hvd.load_model(file, [Own])
    assert isinstance(again.optimizer, Own)
    with pytest.raises(DLSError, match="legacy_opts"):
        hvd.load_model(file, legacy_opts=True)


def test_a_loaded_model_is_not_compiled_by_xla(tmp_path, monkeypatch):
    gpu = tf.config.PhysicalDevice("/physical_device:GPU:0", "GPU")
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind=None: [gpu])
    model = net(keras)
    model.compile(sgd(), "sparse_categorical_crossentropy")
    assert model.jit_compile
    model.save(str(tmp_path / "model.keras"))
    again = hvd.load_model(str(tmp_path / "model.keras"))
    assert not again.jit_compile
    again.fit(*data(32), 16, verbose=0)
    assert_same_on_all_ranks(flat(again))
