"""Horovod's operations of a bucket: what each does, under which name and among which ranks."""

from __future__ import annotations

from enum import Enum
from typing import Any

import horovod.tensorflow as hvd
import numpy as np
import tensorflow as tf

from hvd_dls.adapter.hosts import HostSets


class Stage(Enum):
    """What an operation of a bucket does; its value is what its name ends with."""

    ADD_UP = ".add"  # inside the host: gradients
    SCATTER = ".scatter"  # to a bucket's owners, a part for each
    GATHER = ""  # payloads: of all ranks, or of one of each host
    HAND_ON = ".hand_on"  # inside the host, what came in


class Stages:
    """Adds the operations of a model's buckets to the graph that is being made.

    Horovod matches operations of ranks by name, so each has one of its own, which is the same
    whenever a rank has traced it.

    Args:
        label: of the model, the same on every rank.
        process_set: the ranks.
        host_sets: where the ranks of each host average their gradients first; or None.
    """

    def __init__(self, label: str, process_set: Any, host_sets: HostSets | None) -> None:
        self._label = label
        self._sets = dict.fromkeys(Stage, process_set)
        if host_sets is not None:
            inside, across = host_sets
            self._sets |= {Stage.ADD_UP: inside, Stage.HAND_ON: inside}
            self._sets |= {Stage.SCATTER: across, Stage.GATHER: across}

    def run(
        self, stage: Stage, bucket: int, array: tf.Tensor, splits: tf.Tensor | None = None
    ) -> tf.Tensor:
        """Adds an operation.

        Args:
            stage: which.
            bucket: its number.
            array: (n,) what this rank brings; no constant: TensorFlow would run the operation once,
                when it optimises the graph.
            splits: (P,) int32, how much of it goes to each owner; no constant, either.

        Returns:
            (m,) what comes out of it; the array where this rank is alone.
        """
        process_set = self._sets[stage]
        if process_set is None:
            return array
        options = {
            "name": f"{self._label}.{bucket}{stage.value}",
            "ignore_name_scope": True,
            "process_set": process_set,
        }
        if stage is Stage.ADD_UP:
            return hvd.allreduce(array, op=hvd.Sum, **options)
        if stage is Stage.SCATTER:
            array, _ = hvd.alltoall(array, splits=splits, **options)
            return tf.ensure_shape(array, [None])
        return hvd.allgather(array, **options)


def in_one(array: np.ndarray | list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """What is sent, in one array; and, (P,) int32, how much of it to whom if it is in parts."""
    parts = array if isinstance(array, list) else [array]
    splits = np.array([len(part) for part in parts], np.int32)
    return np.concatenate(parts) if len(parts) > 1 else parts[0], splits
