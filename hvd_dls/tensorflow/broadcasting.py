"""Broadcasts variables of one rank to all.

``hvd.broadcast_variables`` names operations after variables, and Keras 3 calls many of them
"kernel"; and it refuses some of their types.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn

import horovod.tensorflow as hvd
import tensorflow as tf

from hvd_dls.errors import DLSError

# Types that Horovod broadcasts.
_ACCEPTED = (
    *(tf.uint8, tf.int8, tf.uint16, tf.int16, tf.int32, tf.int64),
    *(tf.float16, tf.float32, tf.float64, tf.bool),
)
# Integers with the same bits, by size, as which values of other types are sent.
_SAME_BITS = {1: tf.uint8, 2: tf.uint16, 4: tf.int32, 8: tf.int64}


def broadcast_variables(
    variables: Iterable[Any],
    root_rank: int,
    process_set: hvd.ProcessSet = hvd.global_process_set,
    inplace: bool = False,
) -> None:
    """Gives all ranks the root's values.

    Args:
        variables: Keras's or tf.Variable, in the same order on every rank.
        root_rank: the rank whose values the others take.
        process_set: the ranks that take part.
        inplace: taken for Horovod's sake; makes no difference.
    """
    variables = list(variables)

    @tf.function(autograph=False)  # so that all are on their way at once
    def exchange(values: list[tf.Tensor]) -> list[tf.Tensor]:
        return [
            _broadcast(value, root_rank, f"broadcast_variables.{i}", process_set)
            for i, value in enumerate(values)
        ]

    values = exchange([tf.convert_to_tensor(v) for v in variables])
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def broadcast_global_variables(root_rank: int) -> NoReturn:
    """Refuses: TensorFlow 2 knows no global variables.

    Raises:
        DLSError: always.
    """
    raise DLSError(
        "broadcast_global_variables: TensorFlow 2 has no global variables. With fit, pass "
        f"callbacks=[hvd.callbacks.BroadcastGlobalVariablesCallback({root_rank})]; in a loop of "
        f"your own, call hvd.broadcast_variables(variables, {root_rank}) for those of the model "
        "and of the built optimizer"
    )


def _broadcast(
    value: tf.Tensor, root_rank: int, name: str, process_set: hvd.ProcessSet
) -> tf.Tensor:
    taken = value
    if value.dtype not in _ACCEPTED:
        taken = tf.bitcast(value, _SAME_BITS[value.dtype.size])
    received = hvd.broadcast(
        taken, root_rank, name=name, ignore_name_scope=True, process_set=process_set
    )
    return received if taken is value else tf.bitcast(received, value.dtype)
