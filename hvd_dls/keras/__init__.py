"""Horovod for Keras 3: what Horovod itself lacks there, with or without compression.

    import hvd_dls.keras as hvd
    from hvd_dls.tensorflow import DLSCompressor

    hvd.init()
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.01), compression=DLSCompressor)
    model.compile(optimizer, loss)
    model.fit(..., callbacks=[hvd.callbacks.BroadcastGlobalVariablesCallback(0)])

Names and arguments are those of ``horovod.keras``.  Keras 3 must run on its TensorFlow backend.
"""

# ruff: noqa: E402 - the backend has to be looked at before TensorFlow's half of Horovod is loaded
from hvd_dls.keras.backend import require_tensorflow_backend

require_tensorflow_backend()

from horovod.tensorflow import (
    Average,
    Compression,
    ProcessSet,
    Sum,
    add_process_set,
    allgather,
    allreduce,
    broadcast,
    broadcast_object,
    cross_rank,
    cross_size,
    global_process_set,
    init,
    is_initialized,
    local_rank,
    local_size,
    rank,
    remove_process_set,
    shutdown,
    size,
)

from hvd_dls.keras import callbacks
from hvd_dls.keras.optimizer import DistributedOptimizer, load_model
from hvd_dls.tensorflow import DLSCompressor

__all__ = [
    "Average",
    "Compression",
    "DLSCompressor",
    "DistributedOptimizer",
    "ProcessSet",
    "Sum",
    "add_process_set",
    "allgather",
    "allreduce",
    "broadcast",
    "broadcast_object",
    "callbacks",
    "cross_rank",
    "cross_size",
    "global_process_set",
    "init",
    "is_initialized",
    "load_model",
    "local_rank",
    "local_size",
    "rank",
    "remove_process_set",
    "shutdown",
    "size",
]
