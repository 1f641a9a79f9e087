"""Where the functions of a step run, and how they take their arrays.

On the host they are called with NumPy arrays, on a device with tensors that stay there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import tensorflow as tf

from hvd_dls.core.selection.backend import Array
from hvd_dls.core.selection.passes_numpy import widened
from hvd_dls.tensorflow.on_device import Device


class Side(Protocol):
    """The host or a device."""

    device: str

    def call(
        self, function: Callable[..., Any], inputs: Sequence[tf.Tensor], dtype: tf.DType
    ) -> tf.Tensor:
        """Operation that calls a function, to be placed on ``device``.

        Args:
            function: takes what the other methods are for, and returns one.
            inputs: of the function.
            dtype: of what it returns.
        """

    def flat(self, array: Any) -> Array:
        """An input as a session takes it: (n,)."""

    def cast(self, flat: Array, dtype: tf.DType) -> Any:
        """What came out of a session in another type, for TensorFlow."""

    def number(self, array: Any) -> Any:
        """First entry of an input, float64."""

    def new(self, size: int, dtype: tf.DType) -> Any:
        """(size,) to be overwritten."""

    def writable(self, array: Any) -> Array:
        """What is new, as a session takes it."""

    def write(self, array: Any, values: Any) -> None:
        """Overwrites what is new with a number or an input."""

    def shaped(self, array: Any, shape: Sequence[int]) -> Any:
        """What came out of a session, or is new, for TensorFlow."""


class Host:
    """NumPy arrays."""

    device = "CPU:0"

    def call(
        self, function: Callable[..., Any], inputs: Sequence[tf.Tensor], dtype: tf.DType
    ) -> tf.Tensor:
        return tf.numpy_function(function, inputs, dtype)

    def flat(self, array: np.ndarray) -> np.ndarray:
        return _bits(array).reshape(-1)

    def cast(self, flat: np.ndarray, dtype: tf.DType) -> np.ndarray:
        return widened(flat).astype(dtype.as_numpy_dtype)

    def number(self, array: np.ndarray) -> float:
        return float(array[0])

    def new(self, size: int, dtype: tf.DType) -> np.ndarray:
        """One that TensorFlow takes over without copying: it wants multiples of 64 bytes."""
        raw = np.empty(size * dtype.size + 64, np.uint8)
        start = -raw.ctypes.data % 64
        return raw[start : start + size * dtype.size].view(dtype.as_numpy_dtype)

    def writable(self, array: np.ndarray) -> np.ndarray:
        return _bits(array)

    def write(self, array: np.ndarray, values: Any) -> None:
        array[:] = values

    def shaped(self, array: np.ndarray, shape: Sequence[int]) -> np.ndarray:
        return array.reshape(shape)


class OnDevice:
    """Tensors and variables of a backend."""

    def __init__(self, backend: Device) -> None:
        self.device = backend.name
        self._backend = backend

    def call(
        self, function: Callable[..., Any], inputs: Sequence[tf.Tensor], dtype: tf.DType
    ) -> tf.Tensor:
        return tf.py_function(function, inputs, dtype)

    def flat(self, array: tf.Tensor) -> tf.Tensor:
        return tf.reshape(array, [-1])

    def cast(self, flat: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
        return tf.cast(flat, dtype)

    def number(self, array: tf.Tensor) -> tf.Tensor:
        return tf.cast(array[0], tf.float64)  # on the device: to know it would be to wait for it

    def new(self, size: int, dtype: tf.DType) -> tf.Variable:
        return self._backend.new(size, dtype.as_numpy_dtype)

    def writable(self, array: tf.Variable) -> tf.Variable:
        return array

    def write(self, array: tf.Variable, values: Any) -> None:
        array.assign(tf.broadcast_to(tf.cast(values, array.dtype), array.shape))

    def shaped(self, array: tf.Variable | tf.Tensor, shape: Sequence[int]) -> tf.Tensor:
        return tf.reshape(array, shape)


HOST: Side = Host()


def _bits(array: np.ndarray) -> np.ndarray:
    """The array; of bfloat16, which is not NumPy's own, the bits as uint16."""
    return array.view(np.uint16) if array.dtype == tf.bfloat16.as_numpy_dtype else array
