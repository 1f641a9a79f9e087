"""A callback that saves checkpoints of all ranks while ``fit`` runs, and goes on from them."""

from __future__ import annotations

from os import PathLike
from typing import Any

import tensorflow as tf

from hvd_dls.errors import DLSError
from hvd_dls.tensorflow.checkpoints import load_checkpoint, save_checkpoint


class CheckpointCallback(tf.keras.callbacks.Callback):
    """Saves weights, optimizer and every rank's residuals at the end of epochs.

    On all ranks.  Serves Keras 3 with ``hvd_dls.keras`` and tf_keras with Horovod's own optimizer.

    Args:
        path: folder of all checkpoints; see ``hvd_dls.tensorflow.save_checkpoint``.
        compression: the DLSCompressor, instance or class; None if nothing is compressed.
        every: epochs from one checkpoint to the next.
        keep: how many checkpoints to keep.

    Raises:
        DLSError: ``every`` is no integer >= 1.

    Example:
        >>> checkpoints = CheckpointCallback("checkpoints", compression)
        >>> first = checkpoints.restore(model)  # after compile()
        >>> model.fit(..., initial_epoch=first, callbacks=[checkpoints])
    """

    def __init__(
        self,
        path: str | PathLike[str],
        compression: Any = None,
        *,
        every: int = 1,
        keep: int = 2,
    ) -> None:
        super().__init__()
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise DLSError(f"every={every!r}: accepted is an integer >= 1")
        self.path, self.compression = path, compression
        self.every, self.keep = every, keep
        self._epochs = tf.Variable(0, dtype=tf.int64, trainable=False, name="epochs")

    def restore(self, model: Any, *, missing: str = "refuse") -> int:
        """Goes on from the newest checkpoint, on all ranks alike.

        Args:
            model: compiled, with weights.
            missing: see ``load_checkpoint``.

        Returns:
            How many epochs it has seen: ``initial_epoch`` for ``fit``; 0 without a checkpoint.

        Raises:
            DLSError: see ``load_checkpoint``; or the model is not compiled or has no weights yet.
        """
        if getattr(model, "optimizer", None) is None or not model.built:
            raise DLSError("restore(model): compile the model and build it before")
        if not getattr(model.optimizer, "built", False):
            model.optimizer.build(model.trainable_variables)
        checkpoint = self._checkpoint(model)
        found = load_checkpoint(self.path, checkpoint, self.compression, missing=missing)
        return 0 if found is None else int(self._epochs.numpy())

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if (epoch + 1) % self.every:
            return
        self._epochs.assign(epoch + 1)
        save_checkpoint(self.path, self._checkpoint(self.model), self.compression, keep=self.keep)

    def _checkpoint(self, model: Any) -> tf.train.Checkpoint:
        return tf.train.Checkpoint(model=model, optimizer=model.optimizer, epochs=self._epochs)
