"""A callback that shows what compression does, beside Keras's own metrics."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from hvd_dls.insight import Log


class InsightCallback(tf.keras.callbacks.Callback):
    """Adds compression's figures to the logs of each epoch, and logs steps as training goes.

    Put it before callbacks that write logs down (``CSVLogger``, ``TensorBoard``): they get
    ``dls_density``, ``dls_spread``, ``dls_megabytes`` (handed over a step, on this rank),
    ``dls_dense_megabytes`` (what dense training would) and ``dls_ms`` (that compression took a
    step), over the epoch's last 1,000 steps at most.

    Args:
        compression: as given to ``DistributedOptimizer``: the compressor, or its class.
        target: where steps are logged to, see ``DLSCompressor.log_to``; None: nowhere.
        every: number of steps from one line to the next.
    """

    def __init__(self, compression: Any, target: Any = None, every: int = 10) -> None:
        super().__init__()
        self._compression, self._target, self._every = compression, target, every
        self._log: Log | None = None
        self._steps = 0

    def on_train_begin(self, logs: Any = None) -> None:
        if self._target is not None:
            self._log = self._compression.log_to(self._target, self._every)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._steps = 0

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self._steps += 1

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        stats = self._compression.stats(min(max(self._steps, 1), 1000))
        if stats is None or logs is None:
            return
        period, steps = stats.window, max(stats.window.steps, 1)
        logs["dls_density"] = period.density
        logs["dls_spread"] = stats.spread
        logs["dls_megabytes"] = (period.sparse_bytes + period.dense_bytes) / 1e6 / steps
        logs["dls_dense_megabytes"] = period.whole_bytes / 1e6 / steps
        logs["dls_ms"] = 1e3 * period.seconds.total / steps

    def on_train_end(self, logs: Any = None) -> None:
        if self._log is not None:
            self._log.close()
            self._log = None
