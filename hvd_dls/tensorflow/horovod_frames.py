"""Reads Horovod's Python stack frames: which variable a gradient belongs to, and with what op.

Horovod hands a compressor a bare gradient.  The function that does so, ``allreduce_grads`` in
horovod/tensorflow/__init__.py, holds all gradients of the call and their variables, side by side,
in its local variables.  It is on the Python stack at that moment, and the gradient *is* an element
of its list, the same Python object, which gives the variable (as ``parameter.grad is gradient``
does in torch).  Horovod is not changed, and frames are read only while a function is traced.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any

import horovod.tensorflow as hvd
import tensorflow as tf


class AllreduceCall:
    """One call of Horovod's ``allreduce_grads``.

    Args:
        local_variables: of the frame of ``allreduce_grads``.

    Attributes:
        gradients: of all variables, in their order; None and IndexedSlices among them.
        variables: in the same order; None where Horovod was not given any.
        dense_gradients: those that Horovod hands to the compressor.
        dense_variables: the variables of ``dense_gradients``.
        op: hvd.Average, hvd.Sum or hvd.Adasum.
        process_set: the ranks that exchange gradients.
        grouped: whether several gradients go into one operation and so must share a type.
    """

    def __init__(self, local_variables: Mapping[str, Any]) -> None:
        self.gradients: Sequence[Any] = local_variables["grads"]
        self.variables: Sequence[Any] = local_variables["vars"] or [None] * len(self.gradients)
        self.op: int = local_variables["op"]
        self.process_set: hvd.ProcessSet = local_variables["process_set"]
        self.grouped: bool = local_variables["groups"] is not None
        self._pending = [  # Horovod exchanges sparse gradients without the compressor
            i
            for i, gradient in enumerate(self.gradients)
            if gradient is not None and not isinstance(gradient, tf.IndexedSlices)
        ]
        self.dense_variables = [self.variables[i] for i in self._pending]
        self.dense_gradients = [self.gradients[i] for i in self._pending]

    def take_variable(self, gradient: Any) -> Any:
        """Returns the variable of a gradient, or None; to be called once for each gradient.

        Two variables may have one gradient (of ``a + b``): they are returned in their order.
        """
        for i in self._pending:
            if self.gradients[i] is gradient:
                self._pending.remove(i)
                return self.variables[i]
        return None

    @property
    def finished(self) -> bool:
        """Whether the variables of all gradients have been taken."""
        return not self._pending


def current_call(known: AllreduceCall | None) -> AllreduceCall | None:
    """Returns the innermost call of ``allreduce_grads`` in progress; None outside of any.

    Args:
        known: a call seen before, returned again if it is still the innermost.
    """
    local_variables = _locals_of("allreduce_grads", "grads")
    if local_variables is None:
        return None
    if known is not None and known.gradients is local_variables["grads"]:
        return known
    return AllreduceCall(local_variables)


def direct_op() -> int | None:
    """Returns the op of the ``hvd.allreduce`` or ``hvd.grouped_allreduce`` in progress, if any."""
    local_variables = _locals_of("allreduce", "compression")
    return None if local_variables is None else local_variables["op"]


def wrapping_keras3_optimizer() -> bool:
    """Whether Horovod's own wrapper of a Keras 3 optimizer is being made."""
    keras = sys.modules.get("keras")
    if keras is None or not keras.__version__.startswith("3"):
        return False
    frame = _frame_of("_make_allreduce_grads_fn", "compression")
    if frame is None or frame.f_back is None:
        return False
    return isinstance(frame.f_back.f_locals.get("self"), keras.optimizers.Optimizer)


def _locals_of(function: str, local_variable: str) -> Mapping[str, Any] | None:
    frame = _frame_of(function, local_variable)
    return None if frame is None else frame.f_locals


def _frame_of(function: str, local_variable: str) -> FrameType | None:
    """Returns the frame of the innermost function with this name and this local variable.

    In a traced function, autograph has given the function a prefix and a module of its own.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name.endswith(function) and local_variable in frame.f_locals:
            return frame
        frame = frame.f_back
    return None
