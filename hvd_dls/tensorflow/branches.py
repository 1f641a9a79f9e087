"""The branches in which Horovod reduces single gradients of a traced function: all at once.

Horovod puts each reduction into a branch of a condition (``_allreduce_cond`` in its
tensorflow/__init__.py), and calls ``decompress`` there, a Python function.  TensorFlow has what it
takes for side effects run in order: each branch would wait for the one before, and so each
reduction for a round of all ranks.  Any order will do within a step.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

_FREED = "_independent_side_effects"  # TensorFlow's attribute of what runs in no order


class Branches:
    """The conditions that Horovod makes in one call: see above.

    Args:
        graph: of the gradients, as it is before the first condition.
    """

    def __init__(self, graph: tf.Graph) -> None:
        self._graph: Any = graph
        self._known = len(graph.get_operations())
        manager = getattr(graph, "experimental_acd_manager", None)
        self._manager: Any = None if _in_loop(graph) else manager

    def run_at_once(self) -> None:
        """Takes the order off conditions that have been made by now; to be called in the next one.

        The last one of a call stays in its place.
        """
        if self._manager is None:
            return
        operations = self._graph.get_operations()
        for operation in operations[self._known :]:
            if operation.type == "If":
                self._manager.run_independently(operation)
        self._known = len(operations)


def run_at_once(output: tf.Tensor) -> None:
    """Takes the order off the operation that makes a tensor.

    Where it waits for other ranks, what comes behind it in no order but TensorFlow's need not.
    """
    if tf.is_symbolic_tensor(output):
        manager: Any = getattr(output.graph, "experimental_acd_manager", None)
        if manager is not None:
            manager.run_independently(output.op)


def freed_in(graph: tf.Graph) -> list[tf.Operation]:
    """The conditions of a graph that run in no order: what begins another step waits for them."""
    return [x for x in graph.get_operations() if x.type == "If" and _FREED in x.node_def.attr]


def _in_loop(graph: Any) -> bool:
    """Whether a graph is in a loop's: its next turn would not wait for what is in no order."""
    while graph is not None:
        if type(graph).__name__ == "WhileBodyFuncGraph":
            return True
        graph = getattr(graph, "outer_graph", None)
    return False
