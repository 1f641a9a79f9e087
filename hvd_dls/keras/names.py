"""Names of Horovod's operations: the same on all ranks, and never of two operations in one graph.

Horovod matches the operations of different ranks by name, so nothing may enter a name that is one
process's own: how many optimizers it has made before, or what Keras has called its variables.
"""

from __future__ import annotations

import weakref
from collections import Counter

import tensorflow as tf

_used: weakref.WeakKeyDictionary[tf.Graph, Counter[str]] = weakref.WeakKeyDictionary()


def unique_name(prefix: str) -> str:
    """Returns the prefix, with a number if the function being traced has used it before.

    Ranks trace the same functions, so they get the same numbers.  Executed eagerly, operations
    follow each other, and need none.
    """
    if tf.executing_eagerly():
        return prefix
    used = _used.setdefault(_outermost_graph(), Counter())
    used[prefix] += 1
    return prefix if used[prefix] == 1 else f"{prefix}_{used[prefix]}"


def _outermost_graph() -> tf.Graph:
    """The graph of the outermost function: branches of a condition have graphs of their own."""
    graph = tf.compat.v1.get_default_graph()
    while hasattr(getattr(graph, "outer_graph", None), "outer_graph"):
        graph = graph.outer_graph
    return graph
