"""Handles of variables and graphs of gradients: what a traced function is about."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import tensorflow as tf


def handle_of(variable: Any) -> Any:
    """Returns the resource handle of a tf.Variable or a Keras variable; None for anything else."""
    if not hasattr(variable, "handle"):  # Keras 3 keeps the TensorFlow variable as its value
        variable = getattr(variable, "value", None)
    return getattr(variable, "handle", None)


def identity(handle: Any) -> str:
    """Returns a key that no other variable of this process has: the text of its handle.

    TensorFlow numbers variables in that text.  It reads the same while a function is traced and
    when the function runs, where the handle is the one of the variable that was really passed.
    """
    return str(handle)


def handle_on_cpu(handle: tf.Tensor) -> tf.Tensor:
    """Returns the same handle as an input for an operation on the CPU.

    TensorFlow places an operation that takes a handle on the variable's device.  A Python function
    that compares handles cannot run on a GPU, so the handle travels inside an Optional, which may
    move between devices.
    """
    device = tf.DeviceSpec.from_string(handle.device)
    if device.device_type == "CPU" and device.device_index == 0:
        return handle
    with tf.device(handle.device):
        packed = tf.raw_ops.OptionalFromValue(components=[handle])
    (unpacked,) = tf.raw_ops.OptionalGetValue(
        optional=packed, output_types=[tf.resource], output_shapes=[[]]
    )
    return unpacked


def graph_of(gradients: Sequence[tf.Tensor]) -> AbstractContextManager[Any]:
    """Enters the gradients' graph: Horovod compresses each one in a graph nested in theirs."""
    if tf.is_symbolic_tensor(gradients[0]):
        graph: AbstractContextManager[Any] = gradients[0].graph.as_default()
        return graph
    return nullcontext()


def outermost_graph() -> tf.Graph:
    """Returns the graph of the outermost function that is being traced.

    Functions within it and branches of a condition have graphs of their own.
    """
    graph = tf.compat.v1.get_default_graph()
    while hasattr(getattr(graph, "outer_graph", None), "outer_graph"):
        graph = graph.outer_graph
    return graph
