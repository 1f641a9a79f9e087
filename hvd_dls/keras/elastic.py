"""``horovod.tensorflow.keras.elastic`` for Keras 3: the same names, and what it needs besides.

    import hvd_dls.keras as hvd

    state = hvd.elastic.KerasState(model, batch=0, epoch=0)


    @hvd.elastic.run
    def train(state):
        model.fit(..., epochs=10 - state.epoch, callbacks=[...])

Callbacks that write to the state come before the one that commits it.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf
from horovod._keras import elastic as horovods

from hvd_dls.tensorflow.elastic import TensorFlowKerasState, run

__all__ = [
    "CommitStateCallback",
    "KerasState",
    "UpdateBatchStateCallback",
    "UpdateEpochStateCallback",
    "run",
]


class KerasState(TensorFlowKerasState):
    """The state of a model and its optimizer, with whatever compression or none.

    Args:
        model: built.
        optimizer: None for the one that the model was compiled with.
        compression: the compressor, or several; None for all of this process.
        **kwargs: plain values that all ranks share, which become attributes (batch=0, epoch=0).

    Raises:
        ValueError: the model is not built.
        DLSError: there is no optimizer.
    """

    def __init__(
        self, model: Any, optimizer: Any = None, compression: Any = None, **kwargs: Any
    ) -> None:
        super().__init__(model, optimizer, None, compression, **kwargs)


class CommitStateCallback(horovods.CommitStateCallbackImpl, tf.keras.callbacks.Callback):
    """Commits a state every so many batches, and at the end of each epoch.

    It comes last in the list: what other callbacks write to the state before is committed with it.

    Args:
        state: see ``KerasState``.
        batches_per_commit: number of batches.
    """

    def __init__(self, state: Any, batches_per_commit: int = 1) -> None:
        super().__init__(None, state, batches_per_commit)


class UpdateBatchStateCallback(tf.keras.callbacks.Callback):
    """Keeps the number of the last batch in ``state.batch``; 0 again at the end of an epoch.

    An epoch in which ranks came or went begins anew: Keras lets no callback shorten it.

    Args:
        state: see ``KerasState``.
    """

    def __init__(self, state: Any) -> None:
        super().__init__()
        self.state = state

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.state.batch = batch

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.state.batch = 0


class UpdateEpochStateCallback(tf.keras.callbacks.Callback):
    """Keeps the number of epochs that are done, since the job began, in ``state.epoch``.

    Whether ``fit`` is called with ``epochs=n - state.epoch``, or with ``epochs=n`` and
    ``initial_epoch=state.epoch``.

    Args:
        state: see ``KerasState``.
    """

    def __init__(self, state: Any) -> None:
        super().__init__()
        self.state = state
        self._before = 0
        self._first: int | None = None

    def on_train_begin(self, logs: Any = None) -> None:
        self._before, self._first = self.state.epoch, None

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        if self._first is None:
            self._first = epoch

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        first = epoch if self._first is None else self._first
        self.state.epoch = self._before + epoch - first + 1
