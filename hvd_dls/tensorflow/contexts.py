"""What ``compress`` hands to ``decompress``, and the form in which Horovod takes a gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import tensorflow as tf

if TYPE_CHECKING:
    from hvd_dls.tensorflow.binding import Binding


class Step(NamedTuple):
    """What one traced call of Horovod exchanges of a model: the same each time it runs.

    Attributes:
        layers: names of the model's layers that take part.
        gradients: number of all dense gradients of the call, compressed or not.
        checked: () int64 tensor that is there once the variables are known to be the model's.
        received: () int64 tensor that is there once all ranks' payloads are.
        grouped: whether a placeholder must be of its gradient's type, as Horovod's groups are.
        some_dense: whether some steps to come may send the gradients of compressed layers whole.
    """

    layers: frozenset[str]
    gradients: int
    checked: tf.Tensor
    received: tf.Tensor
    grouped: bool
    some_dense: bool


class Dense(NamedTuple):
    """What ``decompress`` needs to know of a gradient that Horovod reduces whole."""

    dtype: tf.DType
    binding: Binding | None = None  # of the model whose gradient it is, or others of the call are
    step: Step | None = None
    name: str | None = None


class InFlight(NamedTuple):
    """What ``decompress`` needs to know of a gradient that ``compress`` sent on its way."""

    dtype: tf.DType
    binding: Binding
    step: Step
    name: str


def send_dense(gradient: tf.Tensor) -> tuple[tf.Tensor, Dense]:
    """A gradient as Horovod takes it."""
    return tf.cast(gradient, as_horovod_accepts(gradient.dtype)), Dense(gradient.dtype)


def as_horovod_accepts(dtype: tf.DType) -> tf.DType:
    """Horovod's operations refuse bfloat16."""
    return tf.float32 if dtype == tf.bfloat16 else dtype
