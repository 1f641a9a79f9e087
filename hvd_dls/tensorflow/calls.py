"""What Horovod is doing when it calls a compressor: which gradients of which variables.

Horovod hands a compressor a bare gradient, but the function that does so, ``allreduce_grads`` in
horovod/tensorflow/__init__.py, holds all gradients of the call and their variables, side by side,
in its locals.  It is on the Python stack at that moment, and the gradient *is* an element of its
list, the same Python object: that tells the variable, as ``parameter.grad is gradient`` does in
torch.  Nothing of Horovod is changed; its stack is read, while a function is traced, not in
training.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any

import horovod.tensorflow as hvd
import tensorflow as tf


def handle_of(variable: Any) -> Any:
    """The resource handle of a tf.Variable or of Keras's variable; None for anything else."""
    if not hasattr(variable, "handle"):  # Keras 3 keeps the TensorFlow variable as its value
        variable = getattr(variable, "value", None)
    return getattr(variable, "handle", None)


def identity(handle: Any) -> str:
    """What tells a variable from all others of this process: the text of its handle.

    TensorFlow counts variables in it, and it reads the same while a function is traced and, of the
    variable that the function really got, while it runs.
    """
    return str(handle)


def on_host(handle: tf.Tensor) -> tf.Tensor:
    """The same handle, for an operation on the host, where TensorFlow would let it take none.

    An operation that takes a handle is placed beside the variable: the Python function that looks
    at it, on a GPU, where there is no such operation.  A value within an Optional moves freely.
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


class Call:
    """One call of Horovod's ``allreduce_grads``.

    Attributes:
        gradients: of all variables, in their order; None and IndexedSlices among them.
        variables: in the same order.
        op: hvd.Average, hvd.Sum or hvd.Adasum.
        process_set: the ranks that exchange gradients.
        grouped: whether several gradients go into one operation and so must share a type.
    """

    def __init__(self, local: Mapping[str, Any]) -> None:
        self.gradients: Sequence[Any] = local["grads"]
        self.variables: Sequence[Any] = local["vars"] or [None] * len(self.gradients)
        self.op: int = local["op"]
        self.process_set: hvd.ProcessSet = local["process_set"]
        self.grouped: bool = local["groups"] is not None
        # Those that Horovod gives to compress; sparse gradients have a path of their own.
        self._to_come = [
            i
            for i, gradient in enumerate(self.gradients)
            if gradient is not None and not isinstance(gradient, tf.IndexedSlices)
        ]
        self.dense_variables = [self.variables[i] for i in self._to_come]
        self.dense_gradients = [self.gradients[i] for i in self._to_come]

    def take(self, gradient: Any) -> Any:
        """The variable of a gradient, or None; each is asked for once.

        Two variables may have one gradient (of ``a + b``): the first goes first.
        """
        for i in self._to_come:
            if self.gradients[i] is gradient:
                self._to_come.remove(i)
                return self.variables[i]
        return None

    @property
    def over(self) -> bool:
        """Whether all gradients have been taken."""
        return not self._to_come


def innermost_call(current: Call | None) -> Call | None:
    """The call that Horovod is in: ``current`` if it is that; None outside of any."""
    local = _locals_of("allreduce_grads", "grads")
    if local is None:
        return None
    if current is not None and current.gradients is local["grads"]:
        return current
    return Call(local)


def direct_op() -> int | None:
    """The op of the ``hvd.allreduce`` or ``hvd.grouped_allreduce`` that is being called."""
    local = _locals_of("allreduce", "compression")
    return None if local is None else local["op"]


def keras3_optimizer_being_wrapped() -> bool:
    """Whether Horovod is making its own wrapper of a Keras 3 optimizer."""
    keras = sys.modules.get("keras")
    if keras is None or not keras.__version__.startswith("3"):
        return False
    frame = _frame_of("_make_allreduce_grads_fn", "compression")
    if frame is None or frame.f_back is None:
        return False
    return isinstance(frame.f_back.f_locals.get("self"), keras.optimizers.Optimizer)


def _locals_of(function: str, local: str) -> Mapping[str, Any] | None:
    frame = _frame_of(function, local)
    return None if frame is None else frame.f_locals


def _frame_of(function: str, local: str) -> FrameType | None:
    """Frame of the innermost function with this name and this local variable.

    In a traced function autograph has given it a prefix and a module of its own.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name.endswith(function) and local in frame.f_locals:
            return frame
        frame = frame.f_back
    return None
