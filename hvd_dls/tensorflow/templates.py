"""A batch for ranks that never had one: what their training step runs on, to no effect."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import horovod.tensorflow as hvd
import numpy as np
import tensorflow as tf

from hvd_dls.errors import DLSError


def hand_on(batch: Any, there: Sequence[bool], name: str, process_set: hvd.ProcessSet) -> Any:
    """Gives ranks that have no batch the one of the first rank that does.

    All ranks of the process set call it.

    Args:
        batch: a nest of tensors and arrays; None without one.
        there: for each rank of the process set, whether it has one; at least one does.
        name: of the operation.
        process_set: the ranks.

    Returns:
        The given batch, or another rank's.
    """
    if all(there):
        return batch
    root = process_set.ranks[list(there).index(True)]
    sends = hvd.rank() == root
    parts = tf.nest.map_structure(_taken_apart, batch) if sends else None
    parts = hvd.broadcast_object(parts, root, name=name, process_set=process_set)
    return tf.nest.map_structure(_put_together, parts) if batch is None else batch


def gather(numbers: Sequence[int], name: str, process_set: hvd.ProcessSet) -> np.ndarray:
    """Returns all ranks' numbers, (ranks, n) int64."""
    with tf.device("CPU:0"):
        gathered = hvd.allgather(
            tf.constant([list(numbers)], tf.int64), name=name, process_set=process_set
        )
    rows: np.ndarray = gathered.numpy()
    return rows


class _Part:
    """A leaf of a batch, as it can be pickled."""

    def __init__(self, arrays: list[Any], spec: Any) -> None:
        self.arrays = arrays
        self.spec = spec  # None of what is no tensor


def _taken_apart(leaf: Any) -> _Part:
    if not tf.is_tensor(leaf):
        return _Part([leaf], None)
    arrays = [part.numpy() for part in tf.nest.flatten(leaf, expand_composites=True)]
    return _Part(arrays, tf.type_spec_from_value(leaf))


def _put_together(part: _Part) -> Any:
    if part.spec is None:
        return part.arrays[0]
    tensors = [tf.convert_to_tensor(array) for array in part.arrays]
    return tf.nest.pack_sequence_as(part.spec, tensors, expand_composites=True)


def refuse_no_data_at_all(there: Sequence[bool]) -> None:
    """Refuses datasets that are empty on every rank.

    Raises:
        DLSError: they are; on every rank.
    """
    if not any(there):
        raise DLSError("join(...): the dataset has no batch on any rank")
