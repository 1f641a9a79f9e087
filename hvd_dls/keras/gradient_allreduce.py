"""Averages or sums one gradient over ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import horovod.tensorflow as hvd
import tensorflow as tf

from hvd_dls.keras.layers import Layer


@dataclass(frozen=True)
class Allreduce:
    """How an optimizer's gradients are reduced.

    Attributes:
        op: hvd.Average or hvd.Sum.
        process_set: the ranks that exchange gradients.
        predivide_factor: divides before the sum and multiplies after it.
        device_dense: where tensors are reduced; "" leaves it to TensorFlow.
        device_sparse: where IndexedSlices are gathered.
    """

    op: int
    process_set: hvd.ProcessSet
    predivide_factor: float
    device_dense: str
    device_sparse: str

    def dense(self, gradient: tf.Tensor, compression: Any, name: str) -> tf.Tensor:
        """Reduces a tensor.

        Args:
            gradient: of any floating-point type.
            compression: hvd.Compression.none or fp16, or a ``Layer``.
            name: of Horovod's operation.
        """
        # Horovod's operations refuse bfloat16; a Layer sees to that itself.
        reduced = hvd.allreduce(
            gradient if isinstance(compression, Layer) else _wide(gradient),
            op=self.op,
            compression=compression,
            prescale_factor=1 / self.predivide_factor,
            postscale_factor=self.predivide_factor,
            device_dense=self.device_dense,
            name=name,
            ignore_name_scope=True,
            process_set=self.process_set,
        )
        return tf.ensure_shape(tf.cast(reduced, gradient.dtype), gradient.shape)

    def sparse(self, gradient: tf.IndexedSlices, name: str) -> tf.IndexedSlices:
        """Gathers all ranks' rows, as ``hvd.allreduce`` does.

        It would name its operations after the gradients, and these are named after layers, which
        Keras counts in each process: ranks that have made other models before would not match.

        Args:
            gradient: of this rank.
            name: of Horovod's operations.
        """
        with tf.device(self.device_sparse):
            values = self._gather(_wide(gradient.values), f"{name}.values")
            indices = self._gather(gradient.indices, f"{name}.indices")
            if self.op == hvd.Average:
                size = hvd.size_op(process_set_id=self.process_set.process_set_id)
                values /= tf.cast(size, values.dtype)
            values = tf.cast(values, gradient.dtype)
        return tf.IndexedSlices(values, indices, gradient.dense_shape)

    def _gather(self, rows: tf.Tensor, name: str) -> tf.Tensor:
        return hvd.allgather(rows, name=name, ignore_name_scope=True, process_set=self.process_set)


def _wide(tensor: tf.Tensor) -> tf.Tensor:
    return tf.cast(tensor, tf.float32) if tensor.dtype == tf.bfloat16 else tensor
