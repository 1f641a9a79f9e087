"""Callbacks with the names and arguments of ``horovod.keras.callbacks``, which fail with Keras 3.

They also serve tf_keras under TF_USE_LEGACY_KERAS=1, where some of Horovod's own fail as well if
Keras 3 is installed beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import horovod.tensorflow as hvd
import tensorflow as tf

from hvd_dls.adapter import epoch
from hvd_dls.keras.checkpoints import CheckpointCallback
from hvd_dls.keras.insight import InsightCallback
from hvd_dls.tensorflow.broadcasting import broadcast_variables
from hvd_dls.tensorflow.handles import handle_of, identity

__all__ = [
    "BroadcastGlobalVariablesCallback",
    "CheckpointCallback",
    "InsightCallback",
    "LearningRateScheduleCallback",
    "LearningRateWarmupCallback",
    "MetricAverageCallback",
]


class BroadcastGlobalVariablesCallback(tf.keras.callbacks.Callback):
    """Gives all ranks the root's weights and optimizer state when training starts.

    Before the first step if the optimizer has its variables by then, else after it.  Random seeds
    and metrics stay each rank's own; so does what a rank has accumulated of gradients by then.

    Args:
        root_rank: the rank whose values the others take.
        device: where the broadcast runs.
        local_variables: a variable, or several, that each rank keeps as it is.
    """

    def __init__(self, root_rank: int, device: str = "", local_variables: Any = None) -> None:
        super().__init__()
        self.root_rank = root_rank
        self.device = device
        self.broadcast_done = False
        self._epoch: Any = None
        if local_variables is None:
            local_variables = []
        elif handle_of(local_variables) is not None:
            local_variables = [local_variables]
        self._local = {identity(handle_of(v)) for v in local_variables}

    def on_train_begin(self, logs: Any = None) -> None:
        if self._epoch is not epoch():  # Horovod was started anew: others may have joined
            self._epoch, self.broadcast_done = epoch(), False
        optimizer = self.model.optimizer
        if self.model.built and getattr(optimizer, "built", False):
            self._broadcast()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if not self.broadcast_done:
            # Else this pass would count once for each rank at the root, and nowhere else.
            self._broadcast(_accumulated(self.model.optimizer))

    def _broadcast(self, own: Iterable[Any] = ()) -> None:
        if self.broadcast_done:
            return
        self.broadcast_done = True
        of_optimizer = self.model.optimizer.variables
        of_optimizer = of_optimizer() if callable(of_optimizer) else of_optimizer
        kept = self._local | {identity(handle_of(variable)) for variable in own}
        shared = [
            variable
            for variable in [*self.model.weights, *of_optimizer]
            if identity(handle_of(variable)) not in kept
        ]
        with tf.device(self.device):
            broadcast_variables(shared, self.root_rank)


def _accumulated(optimizer: Any) -> list[Any]:
    """Returns the variables in which Keras 3 accumulates gradients of several passes."""
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    accumulators = getattr(inner, "_accumulated_gradients", None) or []
    return [variable for variable in accumulators if variable is not None]


class MetricAverageCallback(tf.keras.callbacks.Callback):
    """Averages metrics over ranks at the end of each epoch, for the callbacks that come after.

    Args:
        device: where the averaging runs.
    """

    def __init__(self, device: str = "") -> None:
        super().__init__()
        self.device = device

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        if not logs:
            return
        names = sorted(logs)
        with tf.device(self.device):
            mine = tf.constant([float(logs[name]) for name in names], tf.float64)
            averages = hvd.allreduce(mine, op=hvd.Average, name="metrics").numpy()
        logs.update(zip(names, averages.tolist(), strict=True))


class LearningRateScheduleCallback(tf.keras.callbacks.Callback):
    """Sets the learning rate to ``initial_lr * multiplier`` from one epoch to another.

    Args:
        initial_lr: learning rate at the start of training.
        multiplier: a function of the epoch, or a number whose power it is: multiplier ** epochs
            since start_epoch.
        start_epoch: the first epoch it applies to.
        end_epoch: the epoch it ends before; None = never.
        staircase: True: at the start of each epoch; False: at every batch, with the epoch as a
            fraction.
        momentum_correction: scale the momentum along with the learning rate, for optimizers that
            keep it multiplied by the learning rate (Goyal et al. 2017, arXiv:1706.02677, 2.1).
        steps_per_epoch: batches an epoch; None = as ``fit`` says.
    """

    def __init__(
        self,
        initial_lr: float,
        multiplier: float | Callable[[float], float],
        start_epoch: int = 0,
        end_epoch: int | None = None,
        staircase: bool = True,
        momentum_correction: bool = True,
        steps_per_epoch: int | None = None,
    ) -> None:
        super().__init__()
        if initial_lr is None:
            raise ValueError("Parameter `initial_lr` is required")
        self.initial_lr = initial_lr
        self.start_epoch = start_epoch
        self.end_epoch = end_epoch
        self.staircase = staircase
        self.momentum_correction = momentum_correction
        self.steps_per_epoch = steps_per_epoch
        self.current_epoch = 0
        if callable(multiplier):
            self.multiplier = multiplier
        else:
            base = multiplier
            self.multiplier = lambda epoch: base ** (epoch - start_epoch)

    def on_train_begin(self, logs: Any = None) -> None:
        if not self.staircase and not self.steps_per_epoch:
            self.steps_per_epoch = self.params.get("steps")
            if not self.steps_per_epoch:
                raise ValueError(
                    "Could not autodetect the number of steps per epoch. Please specify the "
                    f"steps_per_epoch parameter to the {type(self).__name__}()"
                )

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.current_epoch = epoch

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        epoch = self.current_epoch
        if epoch < self.start_epoch or (self.end_epoch is not None and epoch >= self.end_epoch):
            return
        if not self.staircase:
            assert self.steps_per_epoch
            self._set_learning_rate(epoch + batch / self.steps_per_epoch)
        elif batch == 0:
            self._set_learning_rate(epoch)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        if logs is not None:
            logs["lr"] = self._learning_rate()

    def _learning_rate(self) -> float:
        return float(tf.convert_to_tensor(self.model.optimizer.learning_rate))

    def _set_learning_rate(self, epoch: float) -> None:
        optimizer, old = self.model.optimizer, self._learning_rate()
        new = self.initial_lr * self.multiplier(epoch)
        optimizer.learning_rate = new
        if self.momentum_correction and old:
            # Velocity v = momentum * v - lr * g: to correct momentum for one step, as Horovod's
            # callback does, is to scale v once; momentum itself is a constant of the traced step.
            for velocity in _velocities(optimizer):
                velocity.assign(velocity * (new / old))


def _velocities(optimizer: Any) -> Iterable[Any]:
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    velocities: Iterable[Any] = getattr(optimizer, "momentums", ())
    return velocities if type(optimizer).__name__ == "SGD" and optimizer.momentum else ()


class LearningRateWarmupCallback(LearningRateScheduleCallback):
    """Raises the learning rate from ``initial_lr / hvd.size()`` to ``initial_lr``, batch by batch.

    See Goyal et al. 2017, arXiv:1706.02677.

    Args:
        initial_lr: the learning rate to end with.
        warmup_epochs: how long it takes.
        momentum_correction: see ``LearningRateScheduleCallback``.
        steps_per_epoch: batches an epoch; None = as ``fit`` says.
        verbose: 1 = say when it is over.
    """

    def __init__(
        self,
        initial_lr: float,
        warmup_epochs: int = 5,
        momentum_correction: bool = True,
        steps_per_epoch: int | None = None,
        verbose: int = 0,
    ) -> None:
        def multiplier(epoch: float) -> float:
            assert self.steps_per_epoch
            epoch += 1 / self.steps_per_epoch  # so that an epoch ends at a round value
            size: int = hvd.size()
            return (epoch * (size - 1) / warmup_epochs + 1) / size

        super().__init__(
            initial_lr,
            multiplier,
            end_epoch=warmup_epochs,
            staircase=False,
            momentum_correction=momentum_correction,
            steps_per_epoch=steps_per_epoch,
        )
        self.verbose = verbose

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        super().on_epoch_end(epoch, logs)
        last = self.end_epoch is not None and epoch == self.end_epoch - 1
        if last and self.verbose > 0 and hvd.rank() == 0:
            lr = self._learning_rate()
            print(f"\nEpoch {epoch + 1}: finished gradual learning rate warmup to {lr:g}.")
