"""Horovod's operations on values, with the arguments of ``horovod.keras``.

Other arguments of ``horovod.tensorflow``'s are accepted by keyword.
"""

from __future__ import annotations

from typing import Any

import horovod.tensorflow as hvd
import tensorflow as tf


def allreduce(
    value: Any,
    name: str | None = None,
    average: bool | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    op: int | None = None,
    compression: Any = hvd.Compression.none,
    **options: Any,
) -> tf.Tensor:
    """Reduces a value over all ranks: see ``horovod.tensorflow.allreduce``; averages, by default.

    Args:
        value: a tensor or what becomes one; of one shape on all ranks.
        name: of the operation.
        average: deprecated by Horovod: use op.
        prescale_factor: factor before the sum.
        postscale_factor: factor after it.
        op: hvd.Average, hvd.Sum, ...
        compression: hvd.Compression.none or fp16.
        **options: others of ``horovod.tensorflow.allreduce``, as ``process_set``.
    """
    return hvd.allreduce(
        _tensor(value),
        name=name,
        average=average,
        prescale_factor=prescale_factor,
        postscale_factor=postscale_factor,
        op=op,
        compression=compression,
        **options,
    )


def allgather(value: Any, name: str | None = None, **options: Any) -> tf.Tensor:
    """Concatenates all ranks' values along the first dimension, in which they may differ."""
    return hvd.allgather(_tensor(value), name=name, **options)


def broadcast(value: Any, root_rank: int, name: str | None = None, **options: Any) -> tf.Tensor:
    """Returns the root's value on all ranks."""
    return hvd.broadcast(_tensor(value), root_rank, name=name, **options)


def reducescatter(
    value: Any, name: str | None = None, op: int = hvd.Average, **options: Any
) -> tf.Tensor:
    """Reduces a value over all ranks, of which each gets a part along the first dimension."""
    return hvd.reducescatter(_tensor(value), name=name, op=op, **options)


def _tensor(value: Any) -> Any:
    return value if isinstance(value, tf.IndexedSlices) else tf.convert_to_tensor(value)
