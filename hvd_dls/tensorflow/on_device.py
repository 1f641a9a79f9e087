"""Layers whose gradients are on a GPU: all that is as long as a gradient stays there.

The same passes as the core's, in TensorFlow's own operations, run one by one (eagerly), which any
device can: the same bits as the core's, but where TensorFlow takes subnormal numbers for zero, as
it does on a CPU.  What changes is a tf.Variable, all else a tensor.  To the host comes what is
sent, and from there what all ranks sent.

``find`` asks the device for nothing: shapes are known beforehand, and what the host needs is left
there for TensorFlow to bring.  Of int32 nearly all operations run on the host, so integers have 64
bits.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import tensorflow as tf

from hvd_dls.config import DLSConfig
from hvd_dls.core.balancing.sketch import (
    BELOW,
    LAST_BASE,
    MANTISSA_SHIFT,
    N_BINS,
    WINDOW,
    histogram,
)
from hvd_dls.core.selection.backend import Future
from hvd_dls.core.selection.passes import Found, found_on_device
from hvd_dls.core.selection.passes_numpy import sample_stride

TOO_LARGE = 2**31  # entries of a layer: TensorFlow's top_k tells indices in int32
N_PARTS = 3  # of what ``find`` leaves on the device
T = TypeVar("T")


class DeviceFuture(Future[T]):
    """What a device works out.

    Args:
        parts: tensors, results of work that the device has been given.
        read: makes of them, as arrays, what is wanted.

    Attributes:
        parts: to be replaced by arrays once they have been brought to the host.
    """

    def __init__(self, parts: Sequence[Any], read: Callable[..., T]) -> None:
        self.parts = parts
        self._read = read

    def ready(self) -> bool:
        """See ``Future``."""
        return all(isinstance(part, np.ndarray) for part in self.parts)

    def result(self) -> T:
        """See ``Future``."""
        return self._read(*map(np.asarray, self.parts))


def _there(method: Callable[..., T]) -> Callable[..., T]:
    """Has a method of ``Device`` run on that device, whatever the device of the caller."""

    @functools.wraps(method)
    def placed(self: Device, *args: Any) -> T:
        with tf.device(self.name):
            return method(self, *args)

    return placed


class Device:
    """A ``Backend``: residuals, velocities and sums are flat variables on this device.

    Args:
        name: as TensorFlow names it.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        with tf.device(name):
            self._bins_of_window = tf.range(WINDOW, dtype=tf.int64)

    def zeros(self, size: int, dtype: np.dtype) -> tf.Variable:
        # In a thread of its own: what is made in this one while it traces a function, TensorFlow
        # takes for that function's, even in tf.init_scope, and traces it anew or refuses to.
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(self.new, size, dtype).result()

    @_there
    def new(self, size: int, dtype: np.dtype) -> tf.Variable:
        """Zeros, too, of a function that runs, to be forgotten with it."""
        return tf.Variable(tf.zeros(size, dtype), trainable=False)

    @_there
    def load(self, array: tf.Variable, saved: Any) -> None:
        array.assign(np.array(saved, array.dtype.as_numpy_dtype))  # or it may share the memory

    @_there
    def scale(self, array: tf.Variable, factor: float) -> None:
        array.assign(array * factor)

    @_there
    def copy(self, array: tf.Variable | tf.Tensor) -> tf.Tensor:
        return tf.identity(array)

    def to_host(self, array: tf.Variable | tf.Tensor) -> np.ndarray:
        host: np.ndarray = array.numpy()
        return host

    @_there
    def clear(self, array: tf.Variable, indices: np.ndarray) -> None:
        _write(array, tf.constant(indices.astype(np.int64)), tf.zeros(len(indices), array.dtype))

    @_there
    def fill_infinite(self, out: tf.Variable) -> None:
        out.assign(tf.fill(out.shape, tf.constant(math.inf, out.dtype)))

    @_there
    def finite(self, array: tf.Tensor) -> bool:
        return bool(_all_finite(array))

    def histogram(self, array: tf.Tensor) -> np.ndarray:
        return histogram(self.to_host(array))  # wanted of whole gradients once in a training

    # Find ---------------------------------------------------------------------------------------

    def parts(self, dtype: np.dtype) -> list[tf.DType]:
        """Types of what ``find`` leaves on the device, of a residual of this type."""
        return [tf.as_dtype(dtype), tf.int64, tf.float32]

    @_there
    def find(
        self,
        residual: tf.Variable,
        gradient: tf.Tensor,
        k: int,
        last_threshold: float = 0.0,
    ) -> DeviceFuture[Found | None]:
        """See ``core.passes.find``; the parts are values, indices and counts."""
        total = residual + tf.cast(gradient, residual.dtype)
        # What is not finite counts as the largest: so it is among what the host gets to see.
        magnitudes = tf.where(tf.math.is_finite(total), tf.abs(total), math.inf)
        largest, chosen = tf.math.top_k(magnitudes, k, sorted=False)  # ties to the lower index
        chosen = tf.sort(tf.cast(chosen, tf.int64))
        stride = sample_stride(residual.shape[0])
        left = tf.tensor_scatter_nd_update(
            magnitudes, chosen[:, tf.newaxis], tf.zeros(k, magnitudes.dtype)
        )
        base = tf.clip_by_value(_bins(tf.reduce_min(largest)) - BELOW, 0, LAST_BASE)
        window = base + self._bins_of_window
        unsent = _bins(left[::stride]) == window[:, tf.newaxis]
        counts = tf.reduce_sum(tf.cast(unsent, tf.float32), 1)  # whole numbers < 2**24
        read = functools.partial(_found, stride)
        return DeviceFuture((tf.gather(total, chosen), chosen, counts), read)

    # Settle -------------------------------------------------------------------------------------

    @_there
    def settle(
        self,
        residual: tf.Variable,
        gradient: tf.Tensor,
        indices: np.ndarray,
        kept: np.ndarray | None,
        received: Sequence[tuple[np.ndarray, np.ndarray]],
        scale: float | tf.Tensor,
        out: tf.Variable,
    ) -> None:
        """See ``core.passes.settle``; indices must ascend and lie within the layer.

        Without atomic additions, whose order is not known: a rank's indices are unique, and ranks
        follow each other.
        """
        dtype = residual.dtype
        left = np.zeros(len(indices), dtype.as_numpy_dtype) if kept is None else kept
        entries = [indices, *(of_rank for of_rank, _ in received)]
        ends = np.cumsum([len(of_rank) for of_rank in entries]).tolist()
        own, *theirs = map(slice, [0, *ends], ends)
        # Copied to the device at once.
        where = tf.constant(np.concatenate(entries).astype(np.int64))
        values = tf.constant(np.concatenate([left, *(of_rank for _, of_rank in received)]))
        residual.assign_add(tf.cast(gradient, dtype))
        _write(residual, where[own], values[own])
        total = out if out.dtype == dtype else self.new(residual.shape[0], dtype.as_numpy_dtype)
        total.assign(tf.zeros_like(residual))
        for rank in theirs:
            _write(total, where[rank], tf.gather(total, where[rank]) + values[rank])
        # Only where something was sent: zero times a negative factor would be -0.
        everywhere = where[len(indices) :]
        _write(total, everywhere, tf.gather(total, everywhere) * tf.cast(scale, dtype))
        if total is not out:
            out.assign(tf.cast(total, out.dtype))

    # Clipping and momentum ----------------------------------------------------------------------

    @_there
    def correct(
        self,
        gradient: tf.Tensor,
        velocity: tf.Variable | None,
        into: tf.Variable,
        config: DLSConfig,
        loss_scale: float = 1.0,
    ) -> tf.Variable | tf.Tensor:
        """See ``core.momentum.correct``; norms are summed up in another order."""
        own = _clipped(tf.cast(gradient, into.dtype), config, loss_scale)
        if velocity is None:
            into.assign(own)
            return into
        into.assign(velocity * config.momentum)
        into.assign_add(own)
        return into * config.momentum + own if config.nesterov else into


def _clipped(own: tf.Tensor, config: DLSConfig, loss_scale: float) -> tf.Tensor:
    """A gradient that is not finite stays as it is, to be found."""
    if not (config.clip_norm or config.clip_value) or not len(own):
        return own
    clipped = own
    if config.clip_value is not None:
        limit = config.clip_value * loss_scale
        clipped = tf.clip_by_value(clipped, -limit, limit)
    if config.clip_norm is not None:  # scaled, because squares may overflow
        largest = tf.reduce_max(tf.abs(clipped))
        scaled = tf.cast(tf.math.divide_no_nan(clipped, largest), tf.float64)
        norm = tf.cast(largest, tf.float64) * tf.sqrt(tf.reduce_sum(scaled * scaled))
        factor = tf.minimum(config.clip_norm * loss_scale / norm, 1)  # of zeros: min(inf, 1)
        clipped = clipped * tf.cast(factor, own.dtype)
    return tf.where(_all_finite(own), clipped, own)


def _all_finite(array: tf.Tensor) -> tf.Tensor:
    return tf.reduce_all(tf.math.is_finite(array))


def _bins(magnitudes: tf.Tensor) -> tf.Tensor:
    """``core.sketch.bin_of``, int64; any number for what is not finite."""
    bits = tf.cast(tf.bitcast(tf.cast(magnitudes, tf.float32), tf.int32), tf.int64)
    return tf.minimum(tf.bitwise.right_shift(bits, MANTISSA_SHIFT), N_BINS - 1)


def _found(
    stride: int, values: np.ndarray, indices: np.ndarray, counts: np.ndarray
) -> Found | None:
    return found_on_device(indices.astype(np.uint32), values, counts, stride)


def _write(array: tf.Variable, indices: tf.Tensor, values: tf.Tensor) -> None:
    """In place; where an index repeats, its values must be the same."""
    array.scatter_nd_update(indices[:, tf.newaxis], values)
