"""The base class that makes a Keras 3 optimizer distributed.

Horovod's own wrapper overrides methods that Keras 3 never calls.  Keras 3 applies gradients in
``apply`` alone, under ``fit``, ``train_on_batch`` and custom loops: so that is what we override.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from hvd_dls.errors import DLSError
from hvd_dls.keras.accumulation import apply_accumulated, inner_optimizer
from hvd_dls.keras.conditions import run_either
from hvd_dls.keras.reduction import Reduction
from hvd_dls.keras.xla import NotCompiled
from hvd_dls.tensorflow.zeroing import zeroed


class Distributed(NotCompiled):
    """First base class of the optimizers that ``DistributedOptimizer`` returns.

    The second is the given optimizer's own class.
    """

    _reduction: Reduction | None = None

    @tf.autograph.experimental.do_not_convert
    def apply(self, grads: Sequence[Any], trainable_variables: Any = None) -> Any:
        """Averages gradients over ranks, then applies them: Keras's one way to do so."""
        assert self._reduction is not None
        base: Any = super()
        grads = [g if g is None or _is_gradient(g) else tf.convert_to_tensor(g) for g in grads]
        if trainable_variables is None:
            variables = list(getattr(self, "_trainable_variables", ()))
        else:
            trainable_variables = variables = list(trainable_variables)
        nothing_to_reduce = all(g is None for g in grads)
        # If there is one without the other, Keras has something to say.
        if nothing_to_reduce or len(variables) != len(grads) or not self._reduction.active:
            return base.apply(grads, trainable_variables)

        def apply(gradients: list[Any]) -> Any:
            return base.apply(gradients, trainable_variables)

        accumulates = inner_optimizer(self).gradient_accumulation_steps
        if (accumulates or self._reduction.may_skip) and not getattr(self, "built", True):
            with tf.init_scope():
                base.build(variables)
        with zeroed(grads, variables) as grads:
            if accumulates:
                return apply_accumulated(self, self._reduction, grads, variables, apply)
            reduced = self._reduction(grads, variables)
        if not self._reduction.may_skip:
            return apply(reduced.gradients)
        return run_either(reduced.accepted, lambda: apply(reduced.gradients), lambda: None)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "loss_scale_factor" and self._reduction is not None:
            raise DLSError(
                "a LossScaleOptimizer goes inside: DistributedOptimizer(LossScaleOptimizer(...)); "
                "around it, ranks would skip different steps. With a mixed_float16 model, pass one "
                "or set the policy with keras.config.set_dtype_policy"
            )
        super().__setattr__(name, value)


def _is_gradient(given: Any) -> bool:
    return isinstance(given, tf.Tensor | tf.IndexedSlices)
