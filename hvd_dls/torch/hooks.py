"""What happens around ``optimizer.step()``, through torch's own hooks for all optimizers.

torch calls them twice in a step of Horovod's optimizer: before Horovod waits for the gradients,
and, from within Horovod's ``step``, before the weights are updated; and twice after it.
"""

from __future__ import annotations

import logging
import weakref
from typing import Any

import horovod.torch as hvd
import torch
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from hvd_dls.core.session.log import told_again
from hvd_dls.torch import watching
from hvd_dls.torch.compressor import DLSCompressor, compressor_of
from hvd_dls.torch.horovod_frames import within_step_of
from hvd_dls.torch.one_process import apply_options
from hvd_dls.torch.refusals import (
    refuse_adasum,
    refuse_early_scaler,
    refuse_other_moments,
    refuse_own_gradients,
    refuse_second_synchronize,
    refuse_sparse_gradients,
    refuse_unreduced,
)

_log = logging.getLogger("hvd_dls")
_SOON = 10  # steps without a gradient before it is worth a line
_steps_without: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()


def install() -> None:
    """Registers the hooks, once a process."""
    register_optimizer_step_pre_hook(_on_step)
    register_optimizer_step_post_hook(_after_step)


def _on_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    compressor = compressor_of(optimizer)
    if compressor is None:
        return
    if within_step_of(optimizer):
        _before_update(compressor, optimizer)
    else:
        _before_step(compressor, optimizer)


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if compressor_of(optimizer) is not None:
        refuse_own_gradients(optimizer)


def _before_step(compressor: DLSCompressor, optimizer: Any) -> None:
    """Waits for what is on its way; refuses what would drift apart.

    In this order: a rank that is refused may end, and with it Horovod on all of them; the others
    get their own refusal only if they have what they wait for.
    """
    refuse_adasum(optimizer)
    binding = compressor.binding_if_known(optimizer)
    if binding is not None and optimizer._requires_update:
        refuse_second_synchronize(optimizer, binding)
        binding.wait()
        refuse_early_scaler(optimizer)
        refuse_unreduced(optimizer)
        refuse_other_moments(optimizer, compressor.config)  # a scheduler may have set some
        refuse_sparse_gradients(optimizer, optimizer._requires_update, compressor.config)


def _before_update(compressor: DLSCompressor, optimizer: Any) -> None:
    """Has the weights left alone where a step is skipped, or a layer took no part."""
    if not optimizer._requires_update:
        if optimizer.process_set.included() and hvd.size() == 1:
            apply_options(compressor, optimizer)
        return
    binding = compressor.binding_if_known(optimizer)
    if binding is None:
        steps = _steps_without[optimizer] = _steps_without.get(optimizer, 0) + 1
        if steps >= _SOON and told_again(steps):
            _log.warning(
                "nothing has been compressed for %d steps: no gradient of this optimizer has come "
                "to DLSCompressor. Is it hvd.DistributedOptimizer that backward goes through?",
                steps,
            )
        return
    if watching.current is not None:
        watching.current.before_update(optimizer)
    if binding.refused:
        for parameter in optimizer._requires_update:
            parameter.grad = None  # without gradients a step changes nothing, state included
    else:
        binding.clear_untouched()
