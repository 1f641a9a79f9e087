"""Which variables a model may have, what they are called, and where their residuals are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import tensorflow as tf

from hvd_dls.errors import DLSError
from hvd_dls.tensorflow.handles import handle_of

_FLOATS = (tf.float16, tf.bfloat16, tf.float32, tf.float64)


def checked_variables(variables: Iterable[Any]) -> list[Any]:
    """A model's variables as a list.

    Raises:
        DLSError: something else was given, or a gradient would not be floating point.
    """
    wanted = "variables takes tf.Variable or Keras's, as model.trainable_variables gives"
    try:
        variables = list(variables)
    except TypeError as error:
        raise DLSError(f"{wanted}, not {variables!r}") from error
    for variable in variables:
        if handle_of(variable) is None:
            raise DLSError(f"{wanted}, not {type(variable).__name__}")
        if tf.as_dtype(variable.dtype) not in _FLOATS:
            raise DLSError(
                f"variable {variable.name!r} has type {tf.as_dtype(variable.dtype).name}; accepted "
                f"are {', '.join(dtype.name for dtype in _FLOATS)}"
            )
    return variables


def names_of(variables: Iterable[Any]) -> list[str]:
    """Keras's paths or TensorFlow's names; where they repeat, with their position."""
    names: list[str] = []
    for position, variable in enumerate(variables):
        name = getattr(variable, "path", None) or variable.name.removesuffix(":0")
        names.append(f"{name}.{position}" if name in names else name)
    return names


def stays_on_device(variable: Any) -> bool:
    """Whether residual and passes are to be where a variable is; on a CPU, the core's are faster.

    Of other devices than GPUs, gradients go by way of the host.
    """
    return bool(tf.DeviceSpec.from_string(handle_of(variable).device).device_type == "GPU")
