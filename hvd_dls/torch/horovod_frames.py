"""Whose gradient it is that Horovod hands to a compressor.

``compress`` gets a bare tensor, but it is called from methods of Horovod's optimizer
(``_allreduce_grad_async`` and ``_grouped_allreduce_grad_async`` in horovod/torch/optimizer.py),
which are on the Python stack at that moment.  So the optimizer, with its parameters, their names
and its process set, is known at the first gradient of the first step, on every rank alike.  Nothing
of Horovod is changed.
"""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any, NamedTuple

import torch

_CALLERS = ("_allreduce_grad_async", "_grouped_allreduce_grad_async")
_DEPTH = 4  # frames between ``compress`` and Horovod's method: a list comprehension, at most


class Caller(NamedTuple):
    """Who calls ``compress``.

    Attributes:
        optimizer: Horovod's.
        parameter: the gradient's; None where several go in a group.
    """

    optimizer: Any
    parameter: torch.Tensor | None


def caller() -> Caller | None:
    """Horovod's optimizer that hands over a gradient; None if something else calls."""
    frame: FrameType | None = sys._getframe(2)
    for _ in range(_DEPTH):
        if frame is None:
            return None
        if frame.f_code.co_name in _CALLERS:
            local = frame.f_locals
            optimizer = local.get("self")
            if _is_horovods(optimizer):
                return Caller(optimizer, local.get("p"))
        frame = frame.f_back
    return None


def _is_horovods(optimizer: Any) -> bool:
    """Whether an object has what we rely on of Horovod's optimizer."""
    try:
        _ = optimizer._parameter_names, optimizer._requires_update
        _ = optimizer._handles, optimizer._allreduce_delay
    except AttributeError:
        return False
    return True


def within_step_of(optimizer: Any) -> bool:
    """Whether Horovod's own ``step`` is what calls: it is about to update the weights."""
    frame: FrameType | None = sys._getframe(2)
    for _ in range(_DEPTH):
        if frame is None:
            return False
        if frame.f_code.co_name == "step" and frame.f_locals.get("self") is optimizer:
            return frame.f_globals.get("__name__") == "horovod.torch.optimizer"
        frame = frame.f_back
    return False


def within_step_of_scaler() -> bool:
    """Whether a ``torch.amp.GradScaler`` calls ``step``: it has unscaled the gradients by then.

    One that is not enabled has not, as on a machine without a GPU.
    """
    frame: FrameType | None = sys._getframe(2)
    for _ in range(2 * _DEPTH):  # our hooks, wrappers of torch and of a scheduler, the scaler
        if frame is None:
            return False
        if frame.f_globals.get("__name__", "").endswith("amp.grad_scaler"):  # torch < 2.3: cuda.amp
            return bool(frame.f_locals["self"].is_enabled())
        frame = frame.f_back
    return False
