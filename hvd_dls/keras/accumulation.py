"""Keras's gradient accumulation, with gradients exchanged in the last pass of each update only.

Keras adds up the gradients of ``gradient_accumulation_steps`` passes and applies their mean.  The
mean is what ranks average, and what a compressor sees: once for each update.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from hvd_dls.keras.conditions import run_either
from hvd_dls.keras.finiteness import overflowed
from hvd_dls.keras.reduction import Reduction


def inner_optimizer(optimizer: Any) -> Any:
    """Returns the optimizer within a LossScaleOptimizer; any other as it is."""
    return getattr(optimizer, "inner_optimizer", optimizer)


def apply_accumulated(
    optimizer: Any,
    reduction: Reduction,
    gradients: list[Any],
    variables: list[Any],
    apply: Callable[[list[Any]], Any],
) -> None:
    """Takes the gradients of one pass; with the last pass of an update, reduces and applies.

    Args:
        optimizer: built, with ``gradient_accumulation_steps``.
        reduction: of its gradients.
        gradients: of this rank's pass.
        variables: theirs.
        apply: Keras's ``apply`` for these variables, given their gradients.
    """
    inner = inner_optimizer(optimizer)
    passes: int = inner.gradient_accumulation_steps
    accumulators = _accumulators(inner, gradients, variables)
    last = tf.equal((inner._iterations.value + 1) % passes, 0)
    if reduction.scales_loss:
        # A pass is skipped on all ranks or none, though they exchange no gradients.
        finite = reduction.finite_on_all_ranks(gradients)
        gradients = _overflowed_unless(finite, gradients)
        last = tf.logical_and(last, finite)

    def update() -> None:
        scale = optimizer.dynamic_scale.value if reduction.scales_loss else 1.0
        mean = list(gradients)
        for i, total in accumulators.items():
            whole = tf.convert_to_tensor(gradients[i])  # an accumulator is no IndexedSlices
            mean[i] = (whole + tf.cast(total * scale, whole.dtype)) / passes
        if not reduction.scales_loss:  # now, so that an error leaves them empty
            mean = _clear(accumulators, mean)
        reduced, accepted = reduction(mean, variables)
        # Keras will add its accumulators, and divide.
        summed = [g * passes if i in accumulators else g for i, g in enumerate(reduced)]
        if reduction.scales_loss:  # if it is skipped, the next pass takes the place of this one
            finite = _all_finite(summed)
            for total in accumulators.values():
                total.assign(tf.where(finite, tf.zeros_like(total), total))
        if reduction.may_skip:
            run_either(accepted, lambda: apply(summed), lambda: inner._iterations.assign_add(1))
        else:
            apply(summed)

    run_either(last, update, lambda: apply(gradients))


def _accumulators(inner: Any, gradients: list[Any], variables: list[Any]) -> dict[int, tf.Variable]:
    """Returns Keras's accumulators, by position of their gradient.

    Variables that Keras overwrites with their gradient have none.
    """
    return {
        i: inner._accumulated_gradients[inner._get_variable_index(variable)].value
        for i, (gradient, variable) in enumerate(zip(gradients, variables, strict=True))
        if gradient is not None and not getattr(variable, "overwrite_with_gradient", False)
    }


def _clear(accumulators: dict[int, tf.Variable], means: list[Any]) -> list[Any]:
    """Empties accumulators, and returns the means computed from them, not to be used before."""
    means = [None if g is None else tf.identity(g) for g in means]
    there = [m for m in means if m is not None and tf.is_symbolic_tensor(m)]
    with tf.control_dependencies(there):
        cleared = [
            total.assign(tf.zeros_like(total), read_value=False) for total in accumulators.values()
        ]
    with tf.control_dependencies([c for c in cleared if c is not None] if there else []):
        return [None if g is None else tf.identity(g) for g in means]


def _overflowed_unless(finite: tf.Tensor, gradients: list[Any]) -> list[Any]:
    present = [i for i, g in enumerate(gradients) if g is not None]
    chosen = tf.cond(
        finite,
        lambda: [tf.identity(gradients[i]) for i in present],
        lambda: [overflowed(gradients[i]) for i in present],
    )
    of = dict(zip(present, chosen, strict=True))
    return [of.get(i) for i in range(len(gradients))]


def _all_finite(gradients: list[Any]) -> tf.Tensor:
    there = [tf.convert_to_tensor(g) for g in gradients if g is not None]
    return tf.reduce_all(tf.stack([tf.reduce_all(tf.math.is_finite(g)) for g in there]))
