"""Loads saved models to go on training them on several ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import horovod.tensorflow as hvd
import keras

from hvd_dls.errors import DLSError
from hvd_dls.keras.optimizer import DistributedOptimizer


def load_model(
    filepath: str,
    custom_optimizers: Iterable[type[keras.optimizers.Optimizer]] | None = None,
    custom_objects: Mapping[str, Any] | None = None,
    compression: Any = hvd.Compression.none,
    legacy_opts: bool = False,
    **options: Any,
) -> keras.Model:
    """Loads a saved model with its optimizer and its state, made distributed.

    Args:
        filepath: as ``keras.saving.load_model`` takes it.
        custom_optimizers: optimizer classes of your own that it may have been saved with.
        custom_objects: as ``keras.saving.load_model`` takes them.
        compression: see ``DistributedOptimizer``.
        legacy_opts: only False: Keras 3 has no legacy optimizers.
        **options: other arguments of ``DistributedOptimizer``, as ``op`` and ``process_set``.

    Raises:
        DLSError: see ``DistributedOptimizer``.
    """
    if legacy_opts:
        raise DLSError("legacy_opts=True: accepted is False; Keras 3 has no legacy optimizers")
    known = {kind.__name__: kind for kind in custom_optimizers or ()} | dict(custom_objects or {})
    model = keras.saving.load_model(filepath, custom_objects=known)
    if model.optimizer is not None:
        model.optimizer = DistributedOptimizer(model.optimizer, compression=compression, **options)
        model.jit_compile = False  # Keras chose with the optimizer as it was
    return model
