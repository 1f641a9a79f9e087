"""Which Keras runs, on what."""

from __future__ import annotations

from hvd_dls.errors import DLSError

# Before, a LossScaleOptimizer around ours goes unnoticed, and ranks skip different steps.
OLDEST = (3, 10)


def require_tensorflow_backend() -> None:
    """Refuses other Keras than ours, before TensorFlow and Horovod's half for it are loaded.

    Raises:
        DLSError: Keras is older than 3.10, or runs on torch or jax.
    """
    import keras

    if tuple(map(int, keras.__version__.split(".")[:2])) < OLDEST:
        raise DLSError(
            f"hvd_dls.keras needs Keras 3.10 or newer, this is {keras.__version__}. tf_keras needs "
            "no hvd_dls.keras: see docs/tensorflow.md"
        )
    backend = keras.backend.backend()
    if backend != "tensorflow":
        raise DLSError(
            f"hvd_dls.keras works with Keras 3 on the TensorFlow backend, but KERAS_BACKEND is "
            f"{backend!r}. On torch, train with a torch loop, horovod.torch and hvd_dls.torch"
        )
