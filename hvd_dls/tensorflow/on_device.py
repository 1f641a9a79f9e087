"""The backend for layers whose gradients stay on a GPU.

It makes the same passes as the core in TensorFlow's own operations, run eagerly one by one, on any
device.  Results have the same bits as the core's, except for subnormal numbers where TensorFlow
takes them for zero, as it does on a CPU.  Arrays that change are variables, all others tensors.
Only what this rank sends is copied to the host, and only what all ranks sent is copied back.

``find`` never waits for the device: all shapes are known beforehand, and TensorFlow copies to the
host what is needed there.  Integers have 64 bits, since TensorFlow runs nearly all operations on
int32 on the host.
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
from hvd_dls.core.selection.adam import Factors, Moments
from hvd_dls.core.selection.backend import Future
from hvd_dls.core.selection.norms import Norm
from hvd_dls.core.selection.passes import Found, found_on_device
from hvd_dls.core.selection.passes_numpy import sample_stride

TOO_LARGE = 2**31  # entries of a layer: TensorFlow's top_k returns int32 indices
N_PARTS = 3  # tensors that ``find`` leaves on the device
T = TypeVar("T")


class DeviceFuture(Future[T]):
    """The result of work on a device.

    Args:
        parts: tensors on the device that the result is made of.
        read: makes the result from them, given as arrays.

    Attributes:
        parts: to be replaced by arrays once these have been copied to the host.
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


def _on_its_device(method: Callable[..., T]) -> Callable[..., T]:
    """Makes a method of ``Device`` run on that device, whatever device the caller is on."""

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
        # In another thread: a variable made in a thread that traces a function would belong to
        # that function, even in tf.init_scope, and TensorFlow would trace it anew or refuse to.
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(self.new, size, dtype).result()

    @_on_its_device
    def new(self, size: int, dtype: np.dtype) -> tf.Variable:
        """Returns zeros for a function that is running, to be freed with it."""
        return tf.Variable(tf.zeros(size, dtype), trainable=False)

    @_on_its_device
    def load(self, array: tf.Variable, saved: Any) -> None:
        array.assign(np.array(saved, array.dtype.as_numpy_dtype))  # or it may share the memory

    @_on_its_device
    def scale(self, array: tf.Variable, factor: float) -> None:
        array.assign(array * factor)

    @_on_its_device
    def add(self, array: tf.Variable, other: tf.Variable) -> None:
        array.assign_add(tf.cast(other, array.dtype))

    @_on_its_device
    def copy(self, array: tf.Variable | tf.Tensor) -> tf.Variable:
        return tf.Variable(array, trainable=False)

    def to_host(self, array: tf.Variable | tf.Tensor) -> np.ndarray:
        host: np.ndarray = array.numpy()
        return host

    @_on_its_device
    def clear(self, array: tf.Variable, indices: np.ndarray) -> None:
        _write(array, tf.constant(indices.astype(np.int64)), tf.zeros(len(indices), array.dtype))

    @_on_its_device
    def fill(self, out: tf.Variable, value: float) -> None:
        out.assign(tf.fill(out.shape, tf.constant(value, out.dtype)))

    @_on_its_device
    def finite(self, array: tf.Tensor) -> bool:
        return bool(_all_finite(array))

    def histogram(self, array: tf.Tensor) -> np.ndarray:
        return histogram(self.to_host(array))  # wanted of whole gradients once in a training

    # Find ---------------------------------------------------------------------------------------

    def parts(self, dtype: np.dtype) -> list[tf.DType]:
        """Returns the types of the tensors that ``find`` leaves, for a residual of this type."""
        return [tf.as_dtype(dtype), tf.int64, tf.float32]

    @_on_its_device
    def find(
        self,
        residual: tf.Variable,
        gradient: tf.Tensor,
        k: int,
        last_threshold: float = 0.0,
    ) -> DeviceFuture[Found | None]:
        """See ``passes.find``; the parts of the future are values, indices and counts."""
        total = residual + tf.cast(gradient, residual.dtype)
        # NaN and Inf count as the largest, so that the host sees them among the selected values.
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

    @_on_its_device
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
        """See ``passes.settle``; indices must ascend and lie within the layer.

        Ranks are added one after the other, and a rank's indices are unique: no atomic additions,
        whose order would differ between ranks.
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

    @_on_its_device
    def finish(self) -> None:
        pass  # TensorFlow has begun with it

    def sum_up(
        self,
        received: Sequence[tuple[np.ndarray, np.ndarray]],
        scale: float | tf.Tensor,
        out: tf.Variable,
        dtype: np.dtype,
    ) -> None:
        """See ``passes.sum_up``."""
        unused, nothing = self.zeros(out.shape[0], dtype), np.empty(0, np.uint32)
        self.settle(unused, unused, nothing, None, received, scale, out)

    # Clipping, momentum, Adam -------------------------------------------------------------------

    @_on_its_device
    def correct(
        self,
        gradient: tf.Tensor,
        velocity: tf.Variable | None,
        into: tf.Variable,
        config: DLSConfig,
        loss_scale: float = 1.0,
        norm: Norm | None = None,
    ) -> tf.Variable:
        """See ``momentum.correct``; norms are summed in another order than on the host."""
        own = _clipped(tf.cast(gradient, into.dtype), config, loss_scale, norm)
        if velocity is None:
            into.assign(own)
            return into
        into.assign(velocity * config.momentum)
        into.assign_add(own)
        return tf.Variable(into * config.momentum + own) if config.nesterov else into

    @_on_its_device
    def update(
        self,
        gradient: tf.Tensor,
        before: Moments,
        into: Moments,
        update: tf.Variable,
        factors: Factors,
        config: DLSConfig,
        loss_scale: float = 1.0,
        norm: Norm | None = None,
    ) -> None:
        """See ``adam.update_of``."""
        own = _clipped(tf.cast(gradient, update.dtype), config, loss_scale, norm)
        limited = tf.clip_by_value(own, -factors.limit, factors.limit)
        into.first.assign(before.first * factors.first)
        into.first.assign_add(limited * factors.of_first)
        into.first.assign_add(own * factors.nothing)
        own = limited * factors.unscale
        into.second.assign(before.second * factors.second)
        into.second.assign_add(own * own * factors.of_second)
        root = tf.sqrt(into.second * factors.debias_second) + factors.epsilon
        update.assign(into.first * factors.debias_first / root)

    @_on_its_device
    def norm(self, gradient: tf.Tensor, limit: float | None) -> tf.Tensor:
        """See ``norms.l2_norm``; () on this device."""
        own = gradient if gradient.dtype == tf.float64 else tf.cast(gradient, tf.float32)
        if not len(own):
            return tf.zeros((), tf.float64)
        norm = _norm(own if limit is None else tf.clip_by_value(own, -limit, limit))
        return tf.where(_all_finite(own), norm, math.nan)


def _norm(own: tf.Tensor) -> tf.Tensor:
    """Returns () float64: the L2 norm, computed of scaled values, because squares may overflow."""
    largest = tf.reduce_max(tf.abs(own))
    scaled = tf.cast(tf.math.divide_no_nan(own, largest), tf.float64)
    return tf.cast(largest, tf.float64) * tf.sqrt(tf.reduce_sum(scaled * scaled))


def _clipped(own: tf.Tensor, config: DLSConfig, loss_scale: float, known: Norm | None) -> tf.Tensor:
    """Clips a gradient; one with NaN or Inf is returned as it is, to be found later."""
    if not (config.clip_norm or config.clip_value or known) or not len(own):
        return own
    clipped = own
    if config.clip_value is not None:
        limit = config.clip_value * loss_scale
        clipped = tf.clip_by_value(clipped, -limit, limit)
    if known is None and config.clip_norm is not None:
        known = Norm(_norm(clipped), config.clip_norm * loss_scale)
    if known is not None:
        factor = tf.minimum(known.limit / known.value, 1)  # of zeros: min(inf, 1)
        clipped = clipped * tf.cast(factor, own.dtype)
    return tf.where(_all_finite(own), clipped, own)


def _all_finite(array: tf.Tensor) -> tf.Tensor:
    return tf.reduce_all(tf.math.is_finite(array))


def _bins(magnitudes: tf.Tensor) -> tf.Tensor:
    """Returns ``sketch.bin_of`` as int64; for NaN and Inf any number."""
    bits = tf.cast(tf.bitcast(tf.cast(magnitudes, tf.float32), tf.int32), tf.int64)
    return tf.minimum(tf.bitwise.right_shift(bits, MANTISSA_SHIFT), N_BINS - 1)


def _found(
    stride: int, values: np.ndarray, indices: np.ndarray, counts: np.ndarray
) -> Found | None:
    return found_on_device(indices.astype(np.uint32), values, counts, stride)


def _write(array: tf.Variable, indices: tf.Tensor, values: tf.Tensor) -> None:
    """Writes in place; where an index repeats, its values must be the same."""
    array.scatter_nd_update(indices[:, tf.newaxis], values)
