"""Averages all gradients of a step over ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import horovod.tensorflow as hvd
import keras
import tensorflow as tf

from hvd_dls.adapter import is_elastic
from hvd_dls.keras.finiteness import (
    first_not_finite,
    overflowed,
    raise_not_finite,
    report_skipped,
)
from hvd_dls.keras.gradient_allreduce import Allreduce
from hvd_dls.keras.layers import is_compressed, make_layers
from hvd_dls.keras.names import unique_name
from hvd_dls.keras.xla import refuse_jit
from hvd_dls.tensorflow import zeroing
from hvd_dls.tensorflow.binding import Binding
from hvd_dls.tensorflow.compressor import DLSCompressor
from hvd_dls.tensorflow.refusals import refuse_slices
from hvd_dls.tensorflow.traced_models import agreement


class Reduced(NamedTuple):
    """The reduced gradients of a step.

    Attributes:
        gradients: in the order in which they were given.
        accepted: () bool: whether they are to be applied; if not, the step is to be skipped.
    """

    gradients: list[Any]
    accepted: tf.Tensor


class Reduction:
    """Averages an optimizer's gradients over ranks.

    Args:
        optimizer: the distributed optimizer.
        name: prefix of the names of Horovod's operations.
        compression: hvd.Compression.none or fp16, or a DLSCompressor.
        sparse_as_dense: whether IndexedSlices are made tensors before.
        allreduce: how each gradient is reduced.

    Attributes:
        scales_loss: whether the optimizer scales the loss; then it skips steps with Inf itself.
        may_skip: whether ``Reduced.accepted`` may be false; never with an optimizer that does.
    """

    def __init__(
        self,
        optimizer: Any,
        name: str,
        compression: Any,
        sparse_as_dense: bool,
        allreduce: Allreduce,
    ) -> None:
        if isinstance(compression, type) and issubclass(compression, DLSCompressor):
            compression = compression._default()
        self.scales_loss = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
        self._compressor = compression if isinstance(compression, DLSCompressor) else None
        skips = self._compressor is not None and self._compressor.config.nonfinite == "skip"
        self.may_skip = skips and not self.scales_loss
        self._optimizer = optimizer
        self._name = name
        self._compression = compression
        self._sparse_as_dense = sparse_as_dense
        self._allreduce = allreduce
        self._traced: dict[tuple[int, ...], Any] = {}

    @property
    def process_set(self) -> hvd.ProcessSet:
        """The ranks that exchange gradients."""
        return self._allreduce.process_set

    @property
    def active(self) -> bool:
        """Whether gradients go through Horovod or a compressor at all.

        With one process they go through the compressor: clipping, momentum and the check for NaN
        hold there as they do with several.
        """
        process_set = self._allreduce.process_set
        if not process_set.included():
            return False
        return self._compressor is not None or is_elastic() or process_set.size() > 1

    def __call__(self, gradients: list[Any], variables: list[Any]) -> Reduced:
        """Reduces the gradients of these variables; None stays None.

        Raises:
            DLSError: see ``Binding.start`` and ``refuse_jit``.
        """
        if not tf.executing_eagerly():
            refuse_jit()
            return self._reduce(gradients, variables)
        # Traced, so that all gradients are on their way at once.
        key = (zeroing.is_seen_to(), *map(id, variables))
        if key not in self._traced:

            @tf.function(autograph=False)
            def reduce(gradients: list[Any]) -> Reduced:
                return self._reduce(gradients, variables)

            self._traced[key] = reduce
        reduced: Reduced = self._traced[key](gradients)
        return reduced

    def finite_on_all_ranks(self, gradients: Sequence[Any]) -> tf.Tensor:
        """Returns () bool: whether no rank's gradients hold NaN or Inf; the same on all ranks."""
        present = [g for g in gradients if g is not None]
        name = unique_name(f"{self._name}.all_finite")
        return tf.reduce_all(self._first_not_finite(present, name) < 0)

    def _first_not_finite(self, gradients: Sequence[Any], name: str) -> tf.Tensor:
        """See ``first_not_finite``; the exchange may wait for its result, so ranks agree before."""
        agreed = agreement() if is_elastic() and self._compressor is not None else None
        with tf.control_dependencies([] if agreed is None else [agreed]):
            gradients = [_identity(gradient) for gradient in gradients]
        return first_not_finite(gradients, name, self._allreduce.process_set)

    def _reduce(self, gradients: list[Any], variables: list[Any]) -> Reduced:
        name = unique_name(self._name)
        if self._sparse_as_dense:
            gradients = [
                tf.convert_to_tensor(g) if isinstance(g, tf.IndexedSlices) else g for g in gradients
            ]
        binding = self._start_binding(gradients, variables)
        unchecked = self._unchecked(gradients, variables, binding)
        if not unchecked:
            return self._exchange(gradients, variables, binding, name)
        first = self._first_not_finite([gradients[i] for i in unchecked], f"{name}.finite")
        names = [_name_of(variables[i]) for i in unchecked]
        if not self.scales_loss and not self.may_skip:
            with tf.control_dependencies([raise_not_finite(first, names)]):
                gradients = [None if g is None else tf.identity(g) for g in gradients]
            return self._exchange(gradients, variables, binding, name)
        present = [i for i, g in enumerate(gradients) if g is not None]

        def exchange() -> tuple[list[Any], tf.Tensor]:
            reduced = self._exchange(gradients, variables, binding, name)
            return [reduced.gradients[i] for i in present], reduced.accepted

        def skip() -> tuple[list[Any], tf.Tensor]:
            with tf.control_dependencies([report_skipped(binding, first, names)]):
                return [overflowed(gradients[i]) for i in present], tf.constant(False)

        reduced, accepted = tf.cond(tf.reduce_all(first < 0), exchange, skip)
        of = dict(zip(present, reduced, strict=True))
        return Reduced([of.get(i) for i in range(len(gradients))], accepted)

    def _start_binding(self, gradients: list[Any], variables: list[Any]) -> Binding | None:
        """Returns the model of the variables whose gradients are compressed; None without any."""
        ours = [v for v, g in zip(variables, gradients, strict=True) if is_compressed(g, v)]
        if self._compressor is None or not ours:
            return None
        refuse_slices(self._compressor.config, gradients)
        binding = self._compressor.binding_of(ours)
        binding.marks_skipped = self.may_skip or self.scales_loss
        if self.scales_loss and binding.loss_scale is None:
            binding.loss_scale = self._loss_scale
        binding.start(self._allreduce.process_set, self._allreduce.op)
        assert binding.session is not None
        binding.session.marks_skipped |= binding.marks_skipped  # before a function is traced for it
        return binding

    def _unchecked(
        self, gradients: list[Any], variables: list[Any], binding: Binding | None
    ) -> list[int]:
        """Returns positions of the gradients to check for NaN and Inf before the exchange.

        The session checks those of its layers.  But the optimizer's loss scaling skips a step for
        any gradient, and then no residual may have changed; and under elastic Horovod the session
        may have been replaced when the graph runs.
        """
        if self._compressor is None:
            return []
        return [
            i
            for i, (gradient, variable) in enumerate(zip(gradients, variables, strict=True))
            if gradient is not None
            if self.scales_loss or is_elastic() or not _takes_part(binding, gradient, variable)
        ]

    def _exchange(
        self, gradients: list[Any], variables: list[Any], binding: Binding | None, name: str
    ) -> Reduced:
        compressions = [self._compression] * len(gradients)
        if binding is not None:
            # In this graph, which may be that of a branch.
            gradients = [tf.identity(g) if isinstance(g, tf.Tensor) else g for g in gradients]
            compressions = make_layers(binding, gradients, variables)
        reduced: dict[int, Any] = {}
        for i, gradient in enumerate(gradients):
            if isinstance(gradient, tf.IndexedSlices):
                reduced[i] = self._allreduce.sparse(gradient, f"{name}.{i}")
        # An error of the compressor must not keep these rows from other ranks, which wait for them.
        with _after(reduced.values()):
            for i, gradient in enumerate(gradients):
                if isinstance(gradient, tf.Tensor):
                    reduced[i] = self._allreduce.dense(gradient, compressions[i], f"{name}.{i}")
        # All or nothing: if one gradient ends in an error, no weight may move.
        with _after(reduced.values()):
            out = [tf.identity(reduced[i]) if i in reduced else None for i in range(len(gradients))]
        accepted = tf.constant(True)
        if self.may_skip and binding is not None:
            accepted = _accepted(out, variables, binding)
        return Reduced(out, accepted)

    def _loss_scale(self) -> float:
        optimizer = self._optimizer  # as its scale_loss: the variable comes with the first step
        return float(
            optimizer.dynamic_scale.numpy() if optimizer.built else optimizer.initial_scale
        )


def _after(gradients: Any) -> Any:
    """Returns a context whose operations run after these gradients have been computed."""
    there = [g.values if isinstance(g, tf.IndexedSlices) else g for g in gradients]
    return tf.control_dependencies([t for t in there if tf.is_symbolic_tensor(t)])


def _takes_part(binding: Binding | None, gradient: Any, variable: Any) -> bool:
    """Whether a gradient goes through the model's session, compressed or not."""
    if binding is None or binding.session is None or gradient is None:
        return False
    name = binding.name_of(variable) if is_compressed(gradient, variable) else None
    return name is not None and binding.session.takes_part(name)


def _accepted(gradients: list[Any], variables: list[Any], binding: Binding) -> tf.Tensor:
    """Returns whether the session accepted a step; if not, all gradients of its layers are Inf."""
    for gradient, variable in zip(gradients, variables, strict=True):
        if _takes_part(binding, gradient, variable) and gradient.shape.num_elements():
            return tf.math.is_finite(tf.reshape(gradient, [-1])[0])
    return tf.constant(True)


def _identity(gradient: Any) -> Any:
    if not isinstance(gradient, tf.IndexedSlices):
        return tf.identity(gradient)
    return tf.IndexedSlices(tf.identity(gradient.values), gradient.indices, gradient.dense_shape)


def _name_of(variable: Any) -> str:
    return str(getattr(variable, "path", None) or variable.name.removesuffix(":0"))
