"""Executors: where the Python functions of a step run, and in which form they see arrays.

A function on the host is called with NumPy arrays; one on a device with tensors that stay there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import tensorflow as tf

from hvd_dls.core.selection.backend import Array
from hvd_dls.core.selection.passes_numpy import widened
from hvd_dls.tensorflow.on_device import Device


class Executor(Protocol):
    """Calls Python functions from a graph, on the host or on a device.

    Attributes:
        device: name of the TensorFlow device on which to place the calling operation.
    """

    device: str

    def call(
        self, function: Callable[..., Any], inputs: Sequence[tf.Tensor], dtype: tf.DType
    ) -> tf.Tensor:
        """Adds an operation that calls a function.

        Args:
            function: takes the inputs as this executor's arrays, and returns one.
            inputs: of the function.
            dtype: of what the function returns.
        """

    def flatten(self, array: Any) -> Array:
        """Returns an input in the form that a session takes: (n,)."""

    def cast(self, flat: Array, dtype: tf.DType) -> Any:
        """Converts a session's array to a type, to be returned to TensorFlow."""

    def scalar(self, array: Any) -> Any:
        """Returns the first entry of an input as float64."""

    def empty(self, size: int, dtype: tf.DType) -> Any:
        """Returns an uninitialised output: (size,)."""

    def writable(self, array: Any) -> Array:
        """Returns an output in the form in which a session writes to it."""

    def fill(self, array: Any, values: Any) -> None:
        """Overwrites an output with a number or an input."""

    def reshape(self, array: Any, shape: Sequence[int]) -> Any:
        """Returns an output, or a session's array, as TensorFlow takes it."""


class HostExecutor:
    """Runs functions on the host, with NumPy arrays."""

    device = "CPU:0"

    def call(
        self, function: Callable[..., Any], inputs: Sequence[tf.Tensor], dtype: tf.DType
    ) -> tf.Tensor:
        return tf.numpy_function(function, inputs, dtype)

    def flatten(self, array: np.ndarray) -> np.ndarray:
        return _bits(array).reshape(-1)

    def cast(self, flat: np.ndarray, dtype: tf.DType) -> np.ndarray:
        return widened(flat).astype(dtype.as_numpy_dtype)

    def scalar(self, array: np.ndarray) -> float:
        return float(array[0])

    def empty(self, size: int, dtype: tf.DType) -> np.ndarray:
        """Aligned to 64 bytes: TensorFlow takes it over without copying."""
        raw = np.empty(size * dtype.size + 64, np.uint8)
        start = -raw.ctypes.data % 64
        return raw[start : start + size * dtype.size].view(dtype.as_numpy_dtype)

    def writable(self, array: np.ndarray) -> np.ndarray:
        return _bits(array)

    def fill(self, array: np.ndarray, values: Any) -> None:
        array[:] = values

    def reshape(self, array: np.ndarray, shape: Sequence[int]) -> np.ndarray:
        return array.reshape(shape)


class DeviceExecutor:
    """Runs functions on a device, with tensors and variables that stay there.

    Args:
        backend: of that device.
    """

    def __init__(self, backend: Device) -> None:
        self.device = backend.name
        self._backend = backend

    def call(
        self, function: Callable[..., Any], inputs: Sequence[tf.Tensor], dtype: tf.DType
    ) -> tf.Tensor:
        return tf.py_function(function, inputs, dtype)

    def flatten(self, array: tf.Tensor) -> tf.Tensor:
        return tf.reshape(array, [-1])

    def cast(self, flat: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
        return tf.cast(tf.convert_to_tensor(flat), dtype)  # a variable cannot be returned

    def scalar(self, array: tf.Tensor) -> tf.Tensor:
        return tf.cast(array[0], tf.float64)  # stays a tensor: float() would wait for the device

    def empty(self, size: int, dtype: tf.DType) -> tf.Variable:
        return self._backend.new(size, dtype.as_numpy_dtype)

    def writable(self, array: tf.Variable) -> tf.Variable:
        return array

    def fill(self, array: tf.Variable, values: Any) -> None:
        array.assign(tf.broadcast_to(tf.cast(values, array.dtype), array.shape))

    def reshape(self, array: tf.Variable | tf.Tensor, shape: Sequence[int]) -> tf.Tensor:
        return tf.reshape(array, shape)


HOST: Executor = HostExecutor()


def _bits(array: np.ndarray) -> np.ndarray:
    """Views bfloat16, which NumPy does not know, as uint16; other arrays as they are."""
    return array.view(np.uint16) if array.dtype == tf.bfloat16.as_numpy_dtype else array
