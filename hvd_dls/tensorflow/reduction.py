"""Compression of one gradient: what Horovod allreduces of it, and how the result is read.

``compress_gradient`` decides what Horovod gets and returns it with a context, which Horovod hands
back with what came out of its allreduce.  A context's ``decompress`` makes the reduced gradient.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
import tensorflow as tf

from hvd_dls.tensorflow.exchange import Exchange
from hvd_dls.tensorflow.executors import HOST


class Context(Protocol):
    """What Horovod keeps of a gradient between ``compress`` and ``decompress``."""

    def decompress(self, reduced: tf.Tensor) -> tf.Tensor:
        """Returns the reduced gradient.

        Args:
            reduced: what came out of Horovod's allreduce.
        """


class UncompressedContext(NamedTuple):
    """A gradient of no known model: Horovod reduces it as it is."""

    dtype: tf.DType

    def decompress(self, reduced: tf.Tensor) -> tf.Tensor:
        """See ``Context``."""
        return tf.cast(reduced, self.dtype)


class DenseContext(NamedTuple):
    """A gradient that Horovod reduces whole, in a call with compressed ones.

    Attributes:
        exchange: of its call.
        name: of its layer; None if it is no layer of the model.
        dtype: of the gradient.
    """

    exchange: Exchange
    name: str | None
    dtype: tf.DType

    def decompress(self, reduced: tf.Tensor) -> tf.Tensor:
        """See ``Context``."""
        exchange, name = self.exchange, self.name
        binding = exchange.binding
        executor = binding.executor_of(name) if exchange.may_go_dense else HOST

        def accept(received: Any, whole: Any) -> bool:
            session = exchange.session
            with binding.lock, binding.deferred.gradient_of(exchange.n_gradients):
                if binding.deferred.error is None and name is not None:
                    flat = executor.flatten(whole) if session.dense_step else None
                    return session.accept(name, flat)
            return True

        with tf.control_dependencies([reduced]), tf.device(executor.device):
            whole = reduced if exchange.may_go_dense else tf.zeros([0])
            accepted = executor.call(accept, [exchange.received, whole], tf.bool)
        if binding.config.nonfinite == "skip":
            skipped = tf.fill(tf.shape(reduced), tf.cast(binding.skipped_value, reduced.dtype))
            reduced = tf.where(accepted, reduced, skipped)
        with tf.control_dependencies([accepted]):
            return tf.cast(tf.identity(reduced), self.dtype)


class SparseContext(NamedTuple):
    """A gradient of a compressed layer: its entries travel in a payload of the exchange.

    Attributes:
        exchange: of its call.
        name: of its layer.
        dtype: of the gradient.
    """

    exchange: Exchange
    name: str
    dtype: tf.DType

    def decompress(self, reduced: tf.Tensor) -> tf.Tensor:
        """Sums all ranks' entries, scaled as Horovod scaled the placeholder: see ``Context``."""
        exchange, name = self.exchange, self.name
        binding = exchange.binding
        executor, layer = binding.executor_of(name), binding.layer(name)
        dtype = binding.exchanged_dtype(name, self.dtype)

        def sum_up(received: Any, reduced: Any) -> Any:
            session = exchange.session
            total = executor.empty(layer.size, dtype)
            deferred = binding.deferred
            with binding.lock, deferred.gradient_of(exchange.n_gradients):
                accepted = deferred.error is None
                if accepted and session.is_sparse(name):
                    scale = executor.scalar(reduced) / session.groups.count
                    session.decompress(name, executor.writable(total), scale)
                    accepted = not session.refused
                elif accepted:
                    executor.fill(total, reduced)
                    accepted = session.accept(name, reduced)
                if not accepted:
                    executor.fill(total, binding.skipped_value)
            if deferred.error is not None:
                executor.fill(total, 0)
            return executor.reshape(total, layer.shape)

        with tf.device(executor.device):
            total = executor.call(sum_up, [exchange.received, reduced], dtype)
            return tf.cast(tf.ensure_shape(total, layer.shape), self.dtype)


def compress_gradient(
    gradient: tf.Tensor, name: str | None, exchange: Exchange
) -> tuple[tf.Tensor, Context]:
    """Decides what Horovod allreduces of a gradient.

    Args:
        gradient: dense.
        name: of its layer; None if it does not belong to the model.
        exchange: of its call.

    Returns:
        For a compressed layer a placeholder of one 1.0: whatever factor Horovod's reduction applies
        to it (average or sum, pre- and postscale) applies to the gradient.  For others the
        gradient, after clipping and momentum.  And the context of the gradient.
    """
    if not exchange.layers:
        return send_uncompressed(exchange.own(gradient))
    if name is None or name not in exchange.layers:
        with tf.control_dependencies([exchange.checked]):
            sent, _ = send_uncompressed(exchange.own(gradient))
        return sent, DenseContext(exchange, None, gradient.dtype)
    if not exchange.session.may_be_sparse(name):
        whole = exchange.own(gradient)
        if exchange.session.corrects:
            whole = _corrected(whole, name, exchange)
        if exchange.grouped:
            whole = tf.cast(whole, gradient.dtype)
        with tf.control_dependencies([exchange.checked]):
            sent, _ = send_uncompressed(whole)
        return sent, DenseContext(exchange, name, gradient.dtype)
    operation_name = exchange.binding.scale_name(name)
    if exchange.may_go_dense:
        sent = tf.identity(
            _placeholder_or_whole(exchange.own(gradient), name, exchange), name=operation_name
        )
    else:
        dtype = horovod_dtype(gradient.dtype) if exchange.grouped else tf.float64
        # Not before the gradient is there: if a step fails in forward or backward, no rank must be
        # left with an operation that others never began.
        with tf.control_dependencies([exchange.checked, gradient]):
            sent = tf.identity(exchange.one(dtype), name=operation_name)
    return sent, SparseContext(exchange, name, gradient.dtype)


def send_uncompressed(gradient: tf.Tensor) -> tuple[tf.Tensor, Context]:
    """Hands Horovod a gradient as it is, or in a wider type if Horovod does not take its own.

    Horovod names its operation after this tensor, and ranks must have the same name, whatever else
    they have traced before it.
    """
    sent = tf.identity(tf.cast(gradient, horovod_dtype(gradient.dtype)), name="gradient")
    return sent, UncompressedContext(gradient.dtype)


def horovod_dtype(dtype: tf.DType) -> tf.DType:
    """Returns the type in which Horovod takes values of a type: its operations refuse bfloat16."""
    return tf.float32 if dtype == tf.bfloat16 else dtype


def _corrected(gradient: tf.Tensor, name: str, exchange: Exchange) -> tf.Tensor:
    """Applies clipping and momentum to a gradient that goes dense."""
    binding = exchange.binding
    executor = binding.executor_of(name)
    work_dtype = tf.as_dtype(binding.layer(name).work_dtype)

    def correct(checked: Any, array: Any) -> Any:
        with binding.lock:
            corrected = exchange.session.correct(name, executor.flatten(array))
        return executor.reshape(corrected, array.shape)

    with tf.device(executor.device):
        corrected = executor.call(correct, [exchange.checked, gradient], work_dtype)
    return tf.ensure_shape(corrected, gradient.shape)


def _placeholder_or_whole(gradient: tf.Tensor, name: str, exchange: Exchange) -> tf.Tensor:
    """Chooses in each step what is sent: the whole gradient (n,) in a dense one, else 1.0 (1,)."""
    binding = exchange.binding
    executor = binding.executor_of(name)
    dtype = tf.as_dtype(binding.layer(name).work_dtype)
    if exchange.grouped:
        dtype = horovod_dtype(gradient.dtype)

    def choose(checked: Any, array: Any) -> Any:
        session = exchange.session
        with binding.lock:
            if session.is_sparse(name):
                return np.ones(1, dtype.as_numpy_dtype)
            whole = executor.flatten(array)
            if session.corrects:
                whole = session.correct(name, whole)
            return executor.cast(whole, dtype)

    with tf.device(executor.device):
        sent = executor.call(choose, [exchange.checked, gradient], dtype)
    return tf.ensure_shape(sent, [None])
