"""Gradients that a compressor never sees: refused where an option must hold for all."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import tensorflow as tf

from hvd_dls.config import DLSConfig
from hvd_dls.errors import DLSError
from hvd_dls.tensorflow.handles import handle_of, identity


def refuse_slices(config: DLSConfig, gradients: Iterable[Any]) -> None:
    """Refuses gradients that Horovod gathers as they are, if updates are Adam's.

    Args:
        config: the options.
        gradients: of a model, None among them.

    Raises:
        DLSError: one of them is IndexedSlices.
    """
    if config.adam and any(isinstance(gradient, tf.IndexedSlices) for gradient in gradients):
        raise DLSError(
            f"adam={config.adam} in DLSCompressor, but a gradient is tf.IndexedSlices (of an "
            "embedding) and would go without Adam: pass sparse_as_dense=True to Horovod's "
            "DistributedGradientTape or to DistributedOptimizer"
        )


def refuse_twice(variables: Iterable[Any]) -> None:
    """Refuses a list in which a variable stands twice: it has one residual.

    Args:
        variables: of a call of Horovod.

    Raises:
        DLSError: one of them is there twice.
    """
    seen = set()
    for variable in variables:
        key = identity(handle_of(variable))
        if key in seen:
            raise DLSError(
                f"variable {variable.name!r} is twice in the list that tape.gradient(loss, "
                "variables) or the optimizer got; accepted is each once, as with parts of a model "
                "that share a layer: list({v.ref(): v for v in variables}.values())"
            )
        seen.add(key)
