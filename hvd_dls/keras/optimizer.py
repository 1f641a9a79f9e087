"""An optimizer for Keras 3 that averages gradients over ranks before it applies them.

Horovod's own wrapper overrides methods that Keras 3 never calls.  Keras 3 applies gradients in
``apply`` alone, under ``fit``, ``train_on_batch`` and custom loops: so that is what we override.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import horovod.tensorflow as hvd
import keras
import tensorflow as tf
from keras.src.trainers import trainer as keras_trainer

from hvd_dls.errors import DLSError
from hvd_dls.tensorflow.compressor import DLSCompressor
from hvd_dls.tensorflow.exchange import Exchange
from hvd_dls.tensorflow.reduction import Context, compress_gradient

_made: Counter[str] = Counter()


def DistributedOptimizer(  # noqa: N802 - Horovod's name
    optimizer: keras.optimizers.Optimizer,
    name: str | None = None,
    compression: Any = hvd.Compression.none,
    sparse_as_dense: bool = False,
    gradient_predivide_factor: float = 1.0,
    op: int = hvd.Average,
    process_set: hvd.ProcessSet = hvd.global_process_set,
) -> keras.optimizers.Optimizer:
    """A Keras 3 optimizer like the given one that first averages gradients over ranks.

    It is saved and loaded as the given one, without Horovod.  If that has state already, the new
    one goes on from it.

    Args:
        optimizer: a Keras 3 optimizer; a LossScaleOptimizer goes inside, not around.
        name: as Horovod's: prefix of operation names.
        compression: hvd.Compression.none or fp16, or a DLSCompressor, class or instance.
        sparse_as_dense: whether to average IndexedSlices (of embeddings) as dense gradients.
        gradient_predivide_factor: divides before the sum and multiplies after it (Average only).
        op: hvd.Average or hvd.Sum.
        process_set: the ranks that exchange gradients.

    Raises:
        DLSError: another kind of optimizer, or an option Keras 3 cannot be served with.
    """
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise DLSError(
            f"{type(optimizer).__module__}.{type(optimizer).__name__} is no Keras 3 optimizer; for "
            "tf_keras use Horovod's own DistributedOptimizer with the same compression"
        )
    if isinstance(optimizer, _Distributed):
        raise DLSError("the optimizer is a DistributedOptimizer already")
    if op not in (hvd.Average, hvd.Sum):
        raise DLSError(f"op={op!r}: accepted are hvd.Average and hvd.Sum")
    if gradient_predivide_factor != 1 and op != hvd.Average:
        raise DLSError("gradient_predivide_factor: accepted only with op=hvd.Average")
    mixed = keras.mixed_precision.dtype_policy().name == "mixed_float16"  # its name since 3.0
    if mixed and not isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)  # as compile() would
    kind = type(optimizer)
    namespace = {"__module__": _public_module(kind)}  # saved and loaded as that class
    distributed: Any = type(kind.__name__, (_Distributed, kind), namespace)
    made = distributed.from_config(optimizer.get_config())
    _refuse_second_momentum(made, compression)
    made._reduction = _Reduction(
        made,
        name or f"Distributed{kind.__name__}",
        compression,
        sparse_as_dense,
        gradient_predivide_factor,
        op,
        process_set,
    )
    if optimizer.built:
        made.build(optimizer._trainable_variables)
        for own, given in zip(made.variables, optimizer.variables, strict=True):
            own.assign(given)
    return made


def load_model(
    filepath: str,
    custom_objects: Mapping[str, Any] | None = None,
    compression: Any = hvd.Compression.none,
) -> keras.Model:
    """Loads a saved model with its optimizer and its state, made distributed."""
    model = keras.saving.load_model(filepath, custom_objects=custom_objects)
    if model.optimizer is not None:
        model.optimizer = DistributedOptimizer(model.optimizer, compression=compression)
    return model


class _Distributed:
    """What ``DistributedOptimizer`` puts in front of the given optimizer's class."""

    _reduction: _Reduction | None = None

    def apply(self, grads: Sequence[Any], trainable_variables: Any = None) -> Any:
        """Averages gradients over ranks, then applies them: Keras's one way to do so."""
        assert self._reduction is not None
        base: Any = super()
        grads = list(grads)
        if trainable_variables is None:
            variables = list(getattr(self, "_trainable_variables", ()))
        else:
            trainable_variables = variables = list(trainable_variables)
        if len(variables) != len(grads):  # Keras has something to say
            return base.apply(grads, trainable_variables)
        grads = self._reduction(grads, variables)
        if not self._reduction.may_skip:
            return base.apply(grads, trainable_variables)
        if not getattr(self, "built", True):
            with tf.init_scope():
                base.build(variables)
        return tf.cond(
            _counts(grads),
            lambda: _nothing(base.apply(grads, trainable_variables)),
            lambda: _nothing(),
        )

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "loss_scale_factor" and self._reduction is not None:
            raise DLSError(
                "a LossScaleOptimizer goes inside: DistributedOptimizer(LossScaleOptimizer(...)); "
                "around it, ranks would skip different steps. With a mixed_float16 model, pass one "
                "or set the policy with keras.config.set_dtype_policy"
            )
        super().__setattr__(name, value)


class _Reduction:
    """All gradients of a step in, their averages over ranks out."""

    def __init__(
        self,
        optimizer: Any,
        name: str,
        compression: Any,
        sparse_as_dense: bool,
        predivide_factor: float,
        op: int,
        process_set: hvd.ProcessSet,
    ) -> None:
        _made[name] += 1
        self._name = f"{name}.{_made[name]}"
        if isinstance(compression, type) and issubclass(compression, DLSCompressor):
            compression = compression._default()
        self._compression = compression
        self._sparse_as_dense = sparse_as_dense
        self._predivide_factor = predivide_factor
        self._op = op
        self._process_set = process_set
        self._scales_loss = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
        self._optimizer = optimizer
        # LossScaleOptimizer skips steps that are not finite itself.
        skips = isinstance(compression, DLSCompressor) and compression.config.nonfinite == "skip"
        self.may_skip = skips and not self._scales_loss
        self._traced: dict[tuple[int, ...], Any] = {}

    def __call__(self, gradients: list[Any], variables: list[Any]) -> list[Any]:
        if not self._process_set.included() or self._process_set.size() == 1:
            return gradients
        if not tf.executing_eagerly():
            _refuse_jit()
            return self._reduce(gradients, variables)
        # Traced, so that all gradients are on their way at once.
        key = tuple(map(id, variables))
        if key not in self._traced:

            @tf.function(autograph=False)
            def reduce(gradients: list[Any]) -> list[Any]:
                return self._reduce(gradients, variables)

            self._traced[key] = reduce
        reduced: list[Any] = self._traced[key](gradients)
        return reduced

    def _reduce(self, gradients: list[Any], variables: list[Any]) -> list[Any]:
        if self._sparse_as_dense:
            gradients = [
                tf.convert_to_tensor(g) if isinstance(g, tf.IndexedSlices) else g for g in gradients
            ]
        if not isinstance(self._compression, DLSCompressor) or not self._scales_loss:
            return self._exchange(gradients, variables)
        # Loss scaling runs into overflow on purpose and skips the step: on all ranks or none.
        dense = [g for g in gradients if g is not None and not isinstance(g, tf.IndexedSlices)]
        finite = tf.reduce_all([tf.reduce_all(tf.math.is_finite(g)) for g in dense])
        finite_ranks = hvd.allreduce(
            tf.cast(finite, tf.int32),
            op=hvd.Sum,
            name=f"{self._name}.finite",
            process_set=self._process_set,
        )
        present = [i for i, g in enumerate(gradients) if g is not None]
        reduced = tf.cond(
            finite_ranks == self._process_set.size(),
            lambda: [self._exchange(gradients, variables)[i] for i in present],
            lambda: [_overflowed(gradients[i]) for i in present],
        )
        of = dict(zip(present, reduced, strict=True))
        return [of.get(i) for i in range(len(gradients))]

    def _exchange(self, gradients: list[Any], variables: list[Any]) -> list[Any]:
        compressions = [self._compression] * len(gradients)
        if isinstance(self._compression, DLSCompressor):
            # In this graph, which may be that of a branch.
            gradients = [tf.identity(g) if isinstance(g, tf.Tensor) else g for g in gradients]
            compressions = self._layers(gradients, variables)
        reduced = [
            None if gradient is None else self._allreduce(gradient, compression, position)
            for position, (gradient, compression) in enumerate(
                zip(gradients, compressions, strict=True)
            )
        ]
        # All or nothing: if one gradient ends in an error, no weight may move.
        there = [g for g in reduced if isinstance(g, tf.Tensor)]
        in_graph = bool(there) and tf.is_symbolic_tensor(there[0])
        with tf.control_dependencies(there if in_graph else []):
            return [tf.identity(g) if isinstance(g, tf.Tensor) else g for g in reduced]

    def _allreduce(self, gradient: Any, compression: Any, position: int) -> Any:
        wide = gradient
        if gradient.dtype == tf.bfloat16 and not isinstance(compression, _Layer):
            wide = tf.cast(gradient, tf.float32)  # Horovod refuses bfloat16
        if isinstance(gradient, tf.IndexedSlices):
            reduced = hvd.allreduce(wide, op=self._op, process_set=self._process_set)
        else:
            reduced = hvd.allreduce(
                wide,
                op=self._op,
                compression=compression,
                prescale_factor=1 / self._predivide_factor,
                postscale_factor=self._predivide_factor,
                name=f"{self._name}.{position}",
                ignore_name_scope=True,
                process_set=self._process_set,
            )
        return tf.cast(reduced, gradient.dtype)

    def _layers(self, gradients: list[Any], variables: list[Any]) -> list[Any]:
        """A compression for each gradient that knows whose it is."""
        ours = [
            v
            for v, g in zip(variables, gradients, strict=True)
            if not isinstance(g, tf.IndexedSlices)
        ]
        binding = self._compression.binding_of(ours)
        binding.marks_skipped = self.may_skip or self._scales_loss
        if self._scales_loss and binding.loss_scale is None:
            binding.loss_scale = self._loss_scale
        binding.start(self._process_set, self._op)
        dense = [
            (v, g)
            for v, g in zip(variables, gradients, strict=True)
            if g is not None and not isinstance(g, tf.IndexedSlices)
        ]
        if not dense:
            return [hvd.Compression.none] * len(gradients)
        exchange = Exchange(binding, [v for v, _ in dense], [g for _, g in dense])
        return [_Layer(self._compression, binding.name_of(v), exchange) for v in variables]

    def _loss_scale(self) -> float:
        optimizer = self._optimizer  # as its scale_loss: the variable comes with the first step
        return float(
            optimizer.dynamic_scale.numpy() if optimizer.built else optimizer.initial_scale
        )


class _Layer:
    """What Horovod takes for a compressor, of one variable's gradient."""

    def __init__(self, compressor: DLSCompressor, name: str | None, exchange: Exchange) -> None:
        self._name = name
        self._exchange = exchange
        self.decompress = compressor.decompress

    def compress(self, tensor: tf.Tensor) -> tuple[tf.Tensor, Context]:
        return compress_gradient(tensor, self._name, self._exchange)


def _refuse_second_momentum(optimizer: Any, compression: Any) -> None:
    config = getattr(compression, "config", None)
    if config is None or not config.momentum:
        return
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    for theirs in ("momentum", "beta_1"):  # of SGD; of Adam and its like
        if value := getattr(inner, theirs, 0):
            raise DLSError(
                f"momentum={config.momentum} in DLSCompressor takes the place of the optimizer's, "
                f"which has {theirs}={value}: make it with {theirs}=0"
            )


def _counts(gradients: list[Any]) -> tf.Tensor:
    """Whether a step's gradients are to be applied; if not, all their entries are Inf."""
    dense = (g for g in gradients if isinstance(g, tf.Tensor) and g.shape.num_elements())
    first = next(dense, None)
    if first is None:  # of embeddings alone, which never went through the compressor
        return tf.constant(True)
    return tf.math.is_finite(tf.reshape(first, [-1])[0])


def _nothing(*_: Any) -> tf.Tensor:
    """What both branches of a condition return."""
    return tf.constant(0)


def _overflowed(gradient: Any) -> Any:
    """A gradient that LossScaleOptimizer takes for an overflow."""
    if isinstance(gradient, tf.IndexedSlices):
        return gradient
    return tf.fill(tf.shape(gradient), tf.cast(float("inf"), gradient.dtype))


def _public_module(kind: type) -> str:
    """Module under which Keras finds the class again when a saved model is loaded."""
    public = getattr(keras.optimizers, kind.__name__, None) is kind
    return "keras.optimizers" if public else kind.__module__


# XLA ----------------------------------------------------------------------------------------------

_JIT = (
    "jit_compile=True: Horovod's operations cannot be compiled by XLA; leave it at 'auto' or set "
    "it to False in compile()"
)
_keras_supports_jit = keras_trainer.model_supports_jit


def _supports_jit(model: Any) -> bool:
    """Keras's own question whether a model can be compiled, answered with its optimizer in mind.

    Keras asks it of ``jit_compile="auto"``, and once more in the setter if the answer is to be on.
    """
    optimizer = getattr(model, "optimizer", None)
    if not isinstance(optimizer, _Distributed):
        return bool(_keras_supports_jit(model))
    if sys._getframe(1).f_code.co_name == "jit_compile":
        raise DLSError(_JIT)
    return False


keras_trainer.model_supports_jit = _supports_jit


def _refuse_jit() -> None:
    """For a Keras that does not ask: better now than in XLA's words."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_name != "train_step":
        frame = frame.f_back  # type: ignore[assignment]
    if frame is not None and getattr(frame.f_locals.get("self"), "jit_compile", False):
        raise DLSError(_JIT)
