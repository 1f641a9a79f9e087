"""Gradients of zeros, in the steps that a rank takes part in without data.

The step is the user's: it runs on some batch, but nothing of that may reach other ranks.  So while
it is traced, each gradient that is about to be reduced gets ``tf.where(has_data, gradient, 0)``;
NaN of that batch is gone with the rest.  Whether there are data is told in one of two ways: by a
tensor that came with the batch (``told_by``), or, in a loop in Python, by a variable that the loop
sets before each step (``Loop``).  Functions traced outside of both are left as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ClassVar

import tensorflow as tf

from hvd_dls.errors import DLSError

_told: ContextVar[Any] = ContextVar("told", default=None)  # () bool tensor, for what is traced now
_DONE = object()  # in its place, where gradients have got their zeros already

_TRACED_BEFORE = (
    "a training step that was traced outside of join(...) runs within it, where gradients of ranks "
    "without data have to become zeros. Make this function's first step within join(...), or make "
    "the function anew: tf.function(...), and for a tape that is used eagerly a compressor"
)


class Loop:
    """A loop in Python some of whose steps this rank makes without data.

    Attributes:
        exchanges: how often a model's gradients have been exchanged in it.
    """

    current: ClassVar[Loop | None] = None

    def __init__(self) -> None:
        self.exchanges = 0
        with tf.init_scope(), tf.device("CPU:0"):
            self.has_data = _variable()

    def begin(self) -> None:
        """From now on, functions that are traced ask this loop.

        Raises:
            DLSError: another loop has begun and not ended.
        """
        if Loop.current is not None:
            raise DLSError("join() within join(): zip the datasets, and join them as one")
        Loop.current = self

    def end(self) -> None:
        """Functions that were traced meanwhile take all gradients as they are from now on."""
        self.has_data.assign(True)
        Loop.current = None


_variables: list[tf.Variable] = []


def _variable() -> tf.Variable:
    """One for all loops of the process: functions that are traced hold it."""
    if not _variables:
        _variables.append(tf.Variable(True, trainable=False, name="hvd_dls.has_data"))
    return _variables[0]


@contextmanager
def told_by(has_data: tf.Tensor) -> Iterator[None]:
    """Context in which a step is traced whose batch tells whether it is one.

    Args:
        has_data: () bool.
    """
    token = _told.set(has_data)
    try:
        yield
    finally:
        _told.reset(token)


@contextmanager
def zeroed(gradients: Sequence[Any], variables: Sequence[Any]) -> Iterator[list[Any]]:
    """Context of a reduction that gets gradients of zeros where this rank has no data.

    Args:
        gradients: tensors, IndexedSlices and None.
        variables: theirs.  Those that take what is called their gradient as their new value
            (``overwrite_with_gradient``) get it as it is.
    """
    if not applies():
        yield list(gradients)
        return
    own = [
        gradient if getattr(variable, "overwrite_with_gradient", False) else zero(gradient)
        for gradient, variable in zip(gradients, variables, strict=True)
    ]
    token = _told.set(_DONE)
    try:
        yield own
    finally:
        _told.reset(token)


def applies() -> bool:
    """Whether gradients of what is being traced still have to become zeros without data."""
    told = _told.get()
    return told is not _DONE and (told is not None or Loop.current is not None)


def is_seen_to() -> bool:
    """Whether gradients of what is being traced are, or will be, zeros without data."""
    return _told.get() is not None or Loop.current is not None


def zero(gradient: Any) -> Any:
    """Returns a gradient that is zeros where this rank has no data; the same one elsewhere.

    Args:
        gradient: a tensor, IndexedSlices (whose rows become zeros) or None.
    """
    if gradient is None or not applies():
        return gradient
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(zero(gradient.values), gradient.indices, gradient.dense_shape)
    told = _told.get()
    if told is None:
        assert Loop.current is not None
        told = Loop.current.has_data.read_value()
    return tf.where(told, gradient, tf.zeros_like(gradient))


def exchange_begins(seen_to: bool) -> None:
    """Counts a model's exchange; called whenever one begins.

    Args:
        seen_to: ``is_seen_to()`` when it was traced.

    Raises:
        DLSError: gradients would not be zeros.
    """
    loop = Loop.current
    if loop is None:
        return
    if not seen_to:
        raise DLSError(_TRACED_BEFORE)
    loop.exchanges += 1
