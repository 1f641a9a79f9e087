"""Gradients that a compressor never sees: refused where an option must hold for all."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import tensorflow as tf

from hvd_dls.config import DLSConfig
from hvd_dls.errors import DLSError


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
