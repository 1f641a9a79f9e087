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
    Adasum,
    Average,
    Compression,
    ProcessSet,
    Sum,
    add_process_set,
    broadcast_object,
    ccl_built,
    cross_rank,
    cross_size,
    cuda_built,
    ddl_built,
    global_process_set,
    gloo_built,
    gloo_enabled,
    init,
    is_initialized,
    local_rank,
    local_size,
    mpi_built,
    mpi_enabled,
    mpi_threads_supported,
    nccl_built,
    rank,
    remove_process_set,
    rocm_built,
    shutdown,
    size,
    start_timeline,
    stop_timeline,
)

from hvd_dls.keras import callbacks, elastic
from hvd_dls.keras.collectives import allgather, allreduce, broadcast, reducescatter
from hvd_dls.keras.loading import load_model
from hvd_dls.keras.optimizer import DistributedOptimizer
from hvd_dls.keras.uneven import join
from hvd_dls.tensorflow import DLSCompressor
from hvd_dls.tensorflow.broadcasting import broadcast_global_variables, broadcast_variables

__all__ = [
    "Adasum",
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
    "broadcast_global_variables",
    "broadcast_object",
    "broadcast_variables",
    "callbacks",
    "ccl_built",
    "cross_rank",
    "cross_size",
    "cuda_built",
    "ddl_built",
    "elastic",
    "global_process_set",
    "gloo_built",
    "gloo_enabled",
    "init",
    "is_initialized",
    "join",
    "load_model",
    "local_rank",
    "local_size",
    "mpi_built",
    "mpi_enabled",
    "mpi_threads_supported",
    "nccl_built",
    "rank",
    "reducescatter",
    "remove_process_set",
    "rocm_built",
    "shutdown",
    "size",
    "start_timeline",
    "stop_timeline",
]
