"""One process: what a compressor can still do where Horovod applies gradients as they are.

Horovod reduces gradients in a ``tf.cond``.  With one process its other branch runs, which returns
each gradient unchanged; a compressor is only called while the first branch is traced.  It can add
operations then, but no gradient can be changed.  So options that would change gradients are
refused, and NaN and Inf raise an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from hvd_dls.config import DLSConfig
from hvd_dls.errors import DLSError, NonFiniteGradientError
from hvd_dls.tensorflow.handles import graph_of, handle_of
from hvd_dls.tensorflow.variables import checked_variables, layer_specs_of


def refuse_options(config: DLSConfig) -> None:
    """Refuses options without which training would take another way than with two processes.

    Raises:
        DLSError: gradients are to be clipped or to have momentum.
    """
    options = ("momentum", "nesterov", "adam", "clip_norm", "clip_value", "clip_global_norm")
    given = [f"{name}={getattr(config, name)}" for name in options if getattr(config, name)]
    if given:
        raise DLSError(
            f"{', '.join(given)} in DLSCompressor, but there is one process only, and then Horovod "
            "applies gradients as they are: training would take another way than with two. Leave "
            "momentum and clipping to the optimizer, or start two processes (Keras 3: "
            "hvd_dls.keras.DistributedOptimizer does both with one process, too)"
        )


def check_finite(config: DLSConfig, variables: Sequence[Any], gradients: Sequence[Any]) -> None:
    """Adds an operation that raises an error in each step whose gradients hold NaN or Inf.

    Args:
        config: the options.
        variables: of the gradients; what is no variable is not checked.
        gradients: dense.
    """
    pairs = [(v, g) for v, g in zip(variables, gradients, strict=True) if handle_of(v) is not None]
    if not pairs:
        return
    names = [layer.name for layer in layer_specs_of(checked_variables(v for v, _ in pairs))]

    def check(finite: np.ndarray) -> np.int64:
        if finite.all():
            return np.int64(0)
        error = NonFiniteGradientError((names[i], 0) for i in np.flatnonzero(~finite))
        if config.nonfinite == "raise":
            raise error
        raise DLSError(
            f"{error} nonfinite='skip' cannot skip this step: there is one process only, and then "
            "Horovod applies gradients as they are."
        )

    with graph_of(gradients):
        finite = tf.stack([tf.reduce_all(tf.math.is_finite(gradient)) for _, gradient in pairs])
        tf.numpy_function(check, [finite], tf.int64)
