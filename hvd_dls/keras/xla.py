"""Keeps Keras from compiling models with XLA, which cannot compile Horovod's operations.

Keras offers no way to say so: the function that it calls to decide is replaced.
"""

from __future__ import annotations

import sys
from typing import Any

from keras.src.trainers import trainer as keras_trainer

from hvd_dls.errors import DLSError

_JIT = (
    "jit_compile=True: Horovod's operations cannot be compiled by XLA; leave it at 'auto' or set "
    "it to False in compile()"
)
_keras_supports_jit = keras_trainer.model_supports_jit


class NotCompiled:
    """Base class of the optimizers with which a model cannot be compiled."""


def _supports_jit(model: Any) -> bool:
    """Tells Keras whether XLA can compile a model.

    Keras calls it for ``jit_compile="auto"``, and in the setter of ``jit_compile=True``.

    Raises:
        DLSError: it was set to True, with an optimizer of ours.
    """
    if not isinstance(getattr(model, "optimizer", None), NotCompiled):
        return bool(_keras_supports_jit(model))
    if sys._getframe(1).f_code.co_name == "jit_compile":
        raise DLSError(_JIT)
    return False


keras_trainer.model_supports_jit = _supports_jit


def refuse_jit() -> None:
    """Refuses to be traced in a training step that XLA is to compile.

    For a Keras that does not call the function above: XLA's own message would not help.

    Raises:
        DLSError: the model that is being trained has ``jit_compile=True``.
    """
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_name != "train_step":
        frame = frame.f_back  # type: ignore[assignment]
    if frame is not None and getattr(frame.f_locals.get("self"), "jit_compile", False):
        raise DLSError(_JIT)
