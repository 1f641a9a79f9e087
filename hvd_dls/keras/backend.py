"""Which Keras runs, on what."""

from __future__ import annotations

from hvd_dls.errors import DLSError


def require_tensorflow_backend() -> None:
    """Refuses Keras on another backend, before TensorFlow and Horovod's half for it are loaded.

    Raises:
        DLSError: Keras 3 runs on torch or jax.
    """
    import keras

    backend = keras.backend.backend()
    if backend != "tensorflow":
        raise DLSError(
            f"hvd_dls.keras works with Keras 3 on the TensorFlow backend, but KERAS_BACKEND is "
            f"{backend!r}. On torch, train with a torch loop, horovod.torch and hvd_dls.torch"
        )
