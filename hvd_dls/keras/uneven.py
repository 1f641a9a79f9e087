"""``fit`` on ranks with different numbers of batches: who has no more takes part with zeros.

Behind a rank's own batches come copies of one, and each batch tells which it is: tf.data and Keras
fetch batches ahead, so nothing else can.  The model's ``train_step`` is traced on all of them
alike, with gradients that become zeros where the batch is a copy (``zeroing.py``).  If all ranks
know how many batches they have, they agree on the largest number beforehand; if not, they ask each
other in each step whether any has one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import horovod.tensorflow as hvd
import keras
import numpy as np
import tensorflow as tf

from hvd_dls.errors import DLSError
from hvd_dls.keras.conditions import run_either
from hvd_dls.keras.distributed import Distributed
from hvd_dls.tensorflow.templates import gather, hand_on, refuse_no_data_at_all
from hvd_dls.tensorflow.zeroing import told_by

_NAME = "hvd_dls.join.fit"  # of Horovod's operations
# An element of the dataset is a dictionary of a batch and one of the others.
_BATCH = "hvd_dls.batch"  # the first in order: Keras looks there for the batch's size
_HAS_DATA = "hvd_dls.has_data"
_MAY_END = "hvd_dls.may_end"  # as has_data, where all ranks have to be asked whether one has

_Step = Callable[[Any], Any]


def join(model: keras.Model, dataset: tf.data.Dataset, template: Any = None) -> tf.data.Dataset:
    """For ``fit``: ranks may have different numbers of batches.

    With the dataset that it returns, epochs are as long on all ranks as on the one with most
    batches.  A rank that has no more makes its steps on a copy of its first batch, with gradients
    of zeros: an average is over all ranks as ever, and weights change as on the other ranks.  What
    its residuals hold is sent in these steps.  Metrics, the moving averages of batch normalisation
    and all else that is not trained stay as they are in them.  With one process it returns the
    dataset as it is.

    All ranks of the optimizer's process set call it, once for each dataset; its iterator is started
    once for the first batch.  The model's ``train_step`` is wrapped, and works with other data as
    before.

    Args:
        model: compiled with ``hvd_dls.keras.DistributedOptimizer``, of any compression.
        dataset: of batches, as ``fit`` takes them; may be empty on some ranks, and infinite with
            ``steps_per_epoch``.
        template: a batch to make copies of; None: the dataset's first, or if it is empty that of
            another rank.

    Returns:
        A dataset for ``fit`` of this model, and for nothing else; without ``class_weight``.

    Raises:
        DLSError: the model is not compiled, or with another optimizer; what is given is no
            tf.data.Dataset; it is empty on all ranks; or tf.data does not know how many batches it
            has, and several steps make one execution.

    Example:
        >>> model.compile(hvd.DistributedOptimizer(optimizer, compression=DLSCompressor), loss)
        >>> model.fit(join(model, dataset), epochs=3)
    """
    process_set = _process_set(model, dataset)
    if not process_set.included() or process_set.size() == 1:
        return dataset
    if template is None:
        template = next(iter(dataset), None)
    name = f"{_NAME}.{process_set.process_set_id}"
    told = [int(dataset.cardinality()), template is not None]
    sizes, there = gather(told, name, process_set).T
    refuse_no_data_at_all(there.tolist())
    if tf.data.UNKNOWN_CARDINALITY in sizes and model.steps_per_execution > 1:
        raise DLSError(
            f"steps_per_execution={model.steps_per_execution} with join(...), but tf.data does not "
            "know how many batches each rank has: accepted is 1, or tell it: "
            "dataset.apply(tf.data.experimental.assert_cardinality(n))"
        )
    template = hand_on(template, there.tolist(), f"{name}.batch", process_set)
    _wrap(model)
    _make_metrics(model, template)
    return _with_copies(dataset, template, sizes)


def _process_set(model: Any, dataset: Any) -> hvd.ProcessSet:
    optimizer = getattr(model, "optimizer", None)
    if not isinstance(optimizer, Distributed) or optimizer._reduction is None:
        raise DLSError(
            f"join(model, ...): the model's optimizer is {type(optimizer).__name__}; compile it "
            "with hvd_dls.keras.DistributedOptimizer(...) before"
        )
    if not isinstance(dataset, tf.data.Dataset):
        raise DLSError(
            f"join(..., {type(dataset).__name__}): accepted is a tf.data.Dataset of batches; of "
            "arrays it is tf.data.Dataset.from_tensor_slices((x, y)).batch(...)"
        )
    return optimizer._reduction.process_set


# Data -------------------------------------------------------------------------------------------


def _with_copies(dataset: tf.data.Dataset, template: Any, sizes: np.ndarray) -> tf.data.Dataset:
    """Returns a dataset that goes on with copies of a batch.

    Args:
        dataset: this rank's.
        template: the batch.
        sizes: of all ranks' datasets, as tf.data tells them: it may not know.
    """
    unknown = tf.data.UNKNOWN_CARDINALITY in sizes
    key = _MAY_END if unknown else _HAS_DATA

    def told(batches: tf.data.Dataset, has_data: bool) -> tf.data.Dataset:
        flags = tf.data.Dataset.from_tensors(has_data).repeat()
        return tf.data.Dataset.zip({_BATCH: batches, key: flags})

    copies = tf.data.Dataset.from_tensors(template).repeat()
    joined = told(dataset, True).concatenate(told(copies, False))
    if unknown or tf.data.INFINITE_CARDINALITY in sizes:
        return joined
    return joined.take(sizes.max())


# Steps ------------------------------------------------------------------------------------------


def _wrap(model: Any) -> None:
    """Has a model's ``train_step`` take these batches, too."""
    train_step: _Step = model.train_step
    if hasattr(train_step, "takes_copies"):
        return

    @tf.autograph.experimental.do_not_convert
    def step(data: Any) -> Any:
        if not isinstance(data, dict) or _BATCH not in data:
            return train_step(data)
        batch = data[_BATCH]
        if _HAS_DATA in data:
            return _step(model, train_step, batch, data[_HAS_DATA])
        process_set = model.optimizer._reduction.process_set
        with tf.control_dependencies([_some_rank_has(data[_MAY_END], process_set)]):
            return _step(model, train_step, batch, data[_MAY_END])

    step.takes_copies = True
    model.train_step = step
    model.train_function = None  # Keras's, of the train_step of before


def _step(model: Any, train_step: _Step, batch: Any, has_data: tf.Tensor) -> Any:
    """Makes a step; without data, what is not trained is as it was before."""
    kept = [v.value for v in [*model.metrics_variables, *model.non_trainable_variables]]
    before = [tf.identity(variable) for variable in kept]
    with told_by(has_data):
        result = train_step(batch)

    def restore() -> None:
        for variable, value in zip(kept, before, strict=True):
            variable.assign(value)

    run_either(has_data, lambda: None, restore)
    return result


def _some_rank_has(has_data: tf.Tensor, process_set: hvd.ProcessSet) -> tf.Tensor:
    """Returns an operation that ends the epoch, as the end of a dataset does, if none has."""
    with tf.device("CPU:0"):
        some = hvd.allreduce(
            tf.cast(has_data, tf.int32),
            op=hvd.Max,
            name=f"{_NAME}.{process_set.process_set_id}.step",
            ignore_name_scope=True,
            process_set=process_set,
        )

        def check(some: np.ndarray) -> np.bool_:
            if not some:
                raise StopIteration  # which is tf.errors.OutOfRangeError outside
            return np.bool_(True)

        return tf.numpy_function(check, [some], tf.bool)


def _make_metrics(model: Any, template: Any) -> None:
    """Makes the variables of metrics, which Keras would only make in the first step.

    With a ``train_step`` of the user's, only those are kept as they are that are there before.
    """
    if type(model).train_step is not keras.Model.train_step:
        return

    def forward(batch: Any) -> Any:
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(batch)
        output = model(x, training=False)
        model.compute_loss(x=x, y=y, y_pred=output, sample_weight=sample_weight, training=False)
        return model.compute_metrics(x, y, output, sample_weight=sample_weight)

    tf.function(forward, autograph=False).get_concrete_function(template)
