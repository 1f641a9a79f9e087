"""Names of Horovod's operations: the same on all ranks, and unique within a traced function.

Horovod matches the operations of different ranks by name.  So a name must not depend on a process's
past: on how many optimizers it has made, or on the names Keras has given to its variables.
"""

from __future__ import annotations

import weakref
from collections import Counter

import tensorflow as tf

from hvd_dls.tensorflow.handles import outermost_graph

_used: weakref.WeakKeyDictionary[tf.Graph, Counter[str]] = weakref.WeakKeyDictionary()


def unique_name(prefix: str) -> str:
    """Returns the prefix, with a number if the function being traced has used it before.

    Ranks trace the same functions, so they get the same numbers.  Executed eagerly, operations
    follow each other, and need none.
    """
    if tf.executing_eagerly():
        return prefix
    used = _used.setdefault(outermost_graph(), Counter())
    used[prefix] += 1
    return prefix if used[prefix] == 1 else f"{prefix}_{used[prefix]}"
