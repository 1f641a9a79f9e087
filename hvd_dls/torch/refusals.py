"""Optimizers that the compressor cannot serve: better refused than trained wrongly."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import horovod.torch as hvd
import torch

from hvd_dls.config import DLSConfig
from hvd_dls.errors import DLSError
from hvd_dls.torch.horovod_frames import within_step_of_scaler

if TYPE_CHECKING:
    from hvd_dls.torch.binding import Binding


def refuse_process_set(process_set: Any) -> None:
    """Refuses what is no process set, before training meets it.

    Raises:
        DLSError: it is something else, as the number of one.
    """
    if process_set is not None and not isinstance(process_set, hvd.ProcessSet):
        raise DLSError(
            f"process_set={process_set!r}: accepted is an hvd.ProcessSet, the optimizer's own"
        )


def refuse_optimizer(optimizer: Any, config: DLSConfig, process_set: Any) -> None:
    """Refuses what cannot be compressed; on every rank alike, before anything is exchanged.

    Args:
        optimizer: Horovod's.
        config: the options.
        process_set: that was given to the compressor; None: whatever the optimizer has.

    Raises:
        DLSError: op=hvd.Adasum; another process set; momentum in compressor and optimizer; with
            Adam in the compressor, any optimizer but plain SGD.
    """
    refuse_adasum(optimizer)
    if process_set is not None and process_set.ranks != optimizer.process_set.ranks:
        raise DLSError(
            f"process_set of ranks {process_set.ranks} in DLSCompressor, but hvd.Distributed"
            f"Optimizer has one of ranks {optimizer.process_set.ranks}: give the compressor the "
            "same, or none"
        )
    refuse_other_moments(optimizer, config)


def refuse_adasum(optimizer: Any) -> None:
    """Raises DLSError for op=hvd.Adasum."""
    if not hasattr(optimizer, "op") or (optimizer.op == hvd.Adasum and hvd.size() > 1):
        raise DLSError(
            "op=hvd.Adasum: accepted are hvd.Average and hvd.Sum (Adasum combines whole "
            "updates, which cannot be sent in part)"
        )


def refuse_other_moments(optimizer: torch.optim.Optimizer, config: DLSConfig) -> None:
    """Raises DLSError if the compressor and the optimizer both have moments of gradients."""
    if config.momentum:
        refuse_second_momentum(optimizer, config.momentum)
    if config.adam:
        refuse_all_but_sgd(optimizer, config.adam)


def refuse_second_momentum(optimizer: torch.optim.Optimizer, momentum: float) -> None:
    """Raises DLSError if the optimizer has momentum of its own."""
    for group in optimizer.param_groups:
        first, *others = group.get("betas") or (0.0,)  # of Adam and its like
        if group.get("momentum"):
            theirs, instead = f"momentum={group['momentum']}", "momentum=0"
        elif first:
            theirs, instead = f"betas={group['betas']}", f"betas={(0.0, *others)}"
        else:
            continue
        raise DLSError(
            f"momentum={momentum} in DLSCompressor takes the place of the optimizer's, which has "
            f"{theirs}: make it with {instead}"
        )


def refuse_all_but_sgd(optimizer: torch.optim.Optimizer, betas: tuple[float, float]) -> None:
    """Raises DLSError unless an optimizer subtracts Adam's updates as they come."""
    with_momentum = [g for g in optimizer.param_groups if g.get("momentum") or g.get("maximize")]
    if isinstance(optimizer, torch.optim.SGD) and not with_momentum:
        return
    given = type(optimizer).__name__  # that of the class which Horovod derives its own from
    if isinstance(optimizer, torch.optim.SGD):
        group = with_momentum[0]
        given += f" with momentum={group['momentum']}, maximize={group['maximize']}"
    raise DLSError(
        f"adam={betas} in DLSCompressor makes Adam's updates before they are sent, so the "
        f"optimizer must be plain torch.optim.SGD, and it is {given}: make it with the parameters, "
        "Adam's learning rate times the root of the number of ranks, and weight_decay divided by "
        "it (which is decoupled then, as AdamW's)"
    )


def refuse_sparse_gradients(
    optimizer: Any, parameters: Iterable[torch.Tensor], config: DLSConfig
) -> None:
    """Raises DLSError if a gradient is sparse, which Adam in the compressor never sees."""
    for parameter in parameters if config.adam and not optimizer.sparse_as_dense else ():
        if parameter.grad is not None and parameter.grad.is_sparse:
            raise DLSError(
                f"adam={config.adam} in DLSCompressor, but the gradient of a parameter of shape "
                f"{tuple(parameter.shape)} is sparse, and would go without Adam: make the "
                "embedding with sparse=False, or pass sparse_as_dense=True to "
                "hvd.DistributedOptimizer"
            )


def refuse_unreduced(optimizer: Any) -> None:
    """Raises DLSError if a parameter has a gradient that Horovod does not reduce."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None and parameter not in optimizer._requires_update:
                name = optimizer._parameter_names.get(parameter, "without a name")
                raise DLSError(
                    f"parameter {name!r} of shape {tuple(parameter.shape)} was added or unfrozen "
                    "after hvd.DistributedOptimizer was made: Horovod does not reduce its "
                    "gradient, and the ranks would drift apart. Add and unfreeze parameters before "
                    "wrapping the optimizer"
                )


def refuse_early_scaler(optimizer: Any) -> None:
    """Raises DLSError if a scaler has unscaled gradients that are still on their way.

    torch does not count that as a change of a tensor, so ``HandedOver`` cannot see it.
    """
    if optimizer._handles and within_step_of_scaler():
        raise DLSError(
            "scaler.step(optimizer) before optimizer.synchronize(): the scaler would unscale what "
            "is on its way, and what comes back would be applied multiplied by the loss scale. "
            "Call optimizer.synchronize(), then scaler.unscale_(optimizer), then `with optimizer."
            "skip_synchronize(): scaler.step(optimizer)`; and pass loss_scale=scaler.get_scale to "
            "DLSCompressor"
        )


def refuse_early_unscale(optimizer: Any, loss_scale: Any) -> None:
    """Raises DLSError if a scaler has unscaled gradients that are still on their way.

    Args:
        optimizer: Horovod's; None: it is gone.
        loss_scale: the scaler's ``get_scale``; of another function nothing is known.
    """
    states = getattr(getattr(loss_scale, "__self__", None), "_per_optimizer_states", {})
    stage = states.get(id(optimizer), {}).get("stage")  # an enumeration: ready, unscaled, stepped
    if getattr(stage, "name", "") == "UNSCALED":
        raise DLSError(
            "scaler.unscale_(optimizer) before optimizer.synchronize(): it unscales what is on its "
            "way, and what comes back is multiplied by the loss scale. Call optimizer.synchronize()"
            ", then scaler.unscale_(optimizer), then `with optimizer.skip_synchronize(): "
            "scaler.step(optimizer)`"
        )


def refuse_second_synchronize(optimizer: Any, binding: Binding) -> None:
    """Raises DLSError if a step would exchange once more what ``synchronize()`` has brought.

    Plain Horovod warns of it: there it is slow.  Here sums would be taken for gradients, and go
    through selection, clipping and momentum again.  (Not where others have taken their place since:
    by hand, by hvd.broadcast_optimizer_state, or where this rank has no data.)
    """
    again = optimizer._should_synchronize and optimizer._synchronized
    if again and not optimizer._handles and binding.came_in.there(binding.parameters):
        raise DLSError(
            "optimizer.step() after optimizer.synchronize(), which would exchange and compress "
            "what has been averaged once more: write `with optimizer.skip_synchronize(): "
            "optimizer.step()`"
        )


def refuse_own_gradients(optimizer: Any) -> None:
    """Raises DLSError if the weights were updated by gradients that no other rank has seen."""
    if getattr(optimizer, "_handles", None):
        raise DLSError(
            "the weights were updated while gradients were on their way, by this rank's own: the "
            "ranks have drifted apart. Either step() was called within skip_synchronize() without "
            "optimizer.synchronize() before; or with a closure that calls backward(), after which "
            "nothing is averaged: call optimizer.synchronize() in the closure, behind backward(), "
            "and step(closure) within skip_synchronize()"
        )
