"""Optimizers that the compressor cannot serve: better refused than trained wrongly."""

from __future__ import annotations

from typing import Any

import horovod.torch as hvd
import torch

from hvd_dls.config import DLSConfig
from hvd_dls.errors import DLSError


def refuse_optimizer(optimizer: Any, config: DLSConfig, process_set: Any) -> None:
    """Refuses what cannot be compressed; on every rank alike, before anything is exchanged.

    Args:
        optimizer: Horovod's.
        config: the options.
        process_set: that was given to the compressor; None: whatever the optimizer has.

    Raises:
        DLSError: op=hvd.Adasum; another process set; momentum in compressor and optimizer.
    """
    refuse_adasum(optimizer)
    if process_set is not None and process_set.ranks != optimizer.process_set.ranks:
        raise DLSError(
            f"process_set of ranks {process_set.ranks} in DLSCompressor, but hvd.Distributed"
            f"Optimizer has one of ranks {optimizer.process_set.ranks}: give the compressor the "
            "same, or none"
        )
    if config.momentum:
        refuse_second_momentum(optimizer, config.momentum)


def refuse_adasum(optimizer: Any) -> None:
    """Raises DLSError for op=hvd.Adasum."""
    if not hasattr(optimizer, "op") or (optimizer.op == hvd.Adasum and hvd.size() > 1):
        raise DLSError(
            "op=hvd.Adasum: accepted are hvd.Average and hvd.Sum (Adasum combines whole "
            "updates, which cannot be sent in part)"
        )


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
