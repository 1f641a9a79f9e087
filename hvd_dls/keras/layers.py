"""A compressor for each gradient, as Horovod takes them, which knows the gradient's layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import horovod.tensorflow as hvd
import tensorflow as tf

from hvd_dls.tensorflow.binding import Binding
from hvd_dls.tensorflow.exchange import Exchange
from hvd_dls.tensorflow.reduction import Context, compress_gradient


class Layer:
    """The compressor of one variable's gradient.

    Args:
        name: of the layer; None if the variable does not belong to the model.
        exchange: of all gradients of the step.
    """

    def __init__(self, name: str | None, exchange: Exchange) -> None:
        self._name = name
        self._exchange = exchange

    def compress(self, tensor: tf.Tensor) -> tuple[tf.Tensor, Context]:
        """Called by Horovod with the gradient; returns what it allreduces, and a context."""
        return compress_gradient(tensor, self._name, self._exchange)

    def decompress(self, tensor: tf.Tensor, ctx: Context) -> tf.Tensor:
        """Called by Horovod with what came back and the context; returns the reduced gradient."""
        return ctx.decompress(tensor)


def is_compressed(gradient: Any, variable: Any) -> bool:
    """Whether a variable's gradients are compressed, now or, if there is none, later.

    Not IndexedSlices.  And not the new values that some variables of Keras's float8 layers get in
    place of a gradient.
    """
    overwrites = getattr(variable, "overwrite_with_gradient", False)
    return not overwrites and not isinstance(gradient, tf.IndexedSlices)


def make_layers(binding: Binding, gradients: Sequence[Any], variables: Sequence[Any]) -> list[Any]:
    """Adds a step's exchange to the graph of the gradients.

    Args:
        binding: the variables' model, started.
        gradients: of all variables, None and IndexedSlices among them.
        variables: in the same order.

    Returns:
        A compressor for each gradient.
    """
    ours = [
        (v, g)
        for v, g in zip(variables, gradients, strict=True)
        if g is not None and is_compressed(g, v)
    ]
    if not ours:
        return [hvd.Compression.none] * len(gradients)
    exchange = Exchange(binding, [v for v, _ in ours], [g for _, g in ours])
    return [
        Layer(binding.name_of(v), exchange) if is_compressed(g, v) else hvd.Compression.none
        for v, g in zip(variables, gradients, strict=True)
    ]
