"""Checks gradients of all ranks for NaN and Inf, where no session does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import horovod.tensorflow as hvd
import numpy as np
import tensorflow as tf

from hvd_dls.core.session import log
from hvd_dls.errors import NonFiniteGradientError
from hvd_dls.tensorflow.binding import Binding


def first_not_finite(gradients: Sequence[Any], name: str, process_set: hvd.ProcessSet) -> tf.Tensor:
    """Finds on every rank the first gradient with NaN or Inf.

    Args:
        gradients: tensors or IndexedSlices; as many on every rank, at least one.
        name: of Horovod's operation.
        process_set: the ranks that exchange gradients.

    Returns:
        (P,) int64: the position in ``gradients``, or -1, of each rank: the same on all.
    """
    bad = tf.stack(
        [tf.logical_not(tf.reduce_all(tf.math.is_finite(_values(g)))) for g in gradients]
    )
    first = tf.where(tf.reduce_any(bad), tf.argmax(tf.cast(bad, tf.int32)), -1)
    with tf.device("CPU:0"):
        return hvd.allgather(
            tf.reshape(first, [1]), name=name, ignore_name_scope=True, process_set=process_set
        )


def raise_not_finite(first: tf.Tensor, names: Sequence[str]) -> tf.Tensor:
    """Returns an operation that raises NonFiniteGradientError if a gradient held NaN or Inf.

    Args:
        first: as ``first_not_finite`` returns it.
        names: of the gradients' variables.
    """

    def check(first: np.ndarray) -> np.bool_:
        if where := _places(first, names):
            raise NonFiniteGradientError(where)
        return np.bool_(True)

    return tf.numpy_function(check, [first], tf.bool)


def report_skipped(binding: Binding | None, first: tf.Tensor, names: Sequence[str]) -> tf.Tensor:
    """Returns an operation that counts a skipped step and writes it to the log.

    Args:
        binding: the model, whose session counts them.
        first: as ``first_not_finite`` returns it.
        names: of the gradients' variables.
    """

    def count(first: np.ndarray) -> np.bool_:
        if binding is not None and binding.session is not None:
            session = binding.session
            session.skipped += 1
            if session.rank == 0:
                log.skipped(session.skipped, list(_places(first, names)))
        return np.bool_(True)

    return tf.numpy_function(count, [first], tf.bool)


def _places(first: np.ndarray, names: Sequence[str]) -> list[tuple[str, int]]:
    """Returns name and rank of each gradient that ``first_not_finite`` found."""
    return [(names[i], rank) for rank, i in enumerate(first) if i >= 0]


def overflowed(gradient: Any) -> Any:
    """Returns a gradient of the same kind that holds Inf only."""
    infinity = tf.cast(float("inf"), gradient.dtype)
    if not isinstance(gradient, tf.IndexedSlices):
        return tf.fill(tf.shape(gradient), infinity)
    # One row: this rank's batch may have used none, and then there would be no Inf.
    shape = tf.concat([[1], tf.shape(gradient.values)[1:]], 0)
    row = tf.zeros([1], gradient.indices.dtype)
    return tf.IndexedSlices(tf.fill(shape, infinity), row, gradient.dense_shape)


def _values(gradient: Any) -> tf.Tensor:
    return gradient.values if isinstance(gradient, tf.IndexedSlices) else gradient
