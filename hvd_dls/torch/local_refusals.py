"""What ``LocalSteps`` refuses: arguments, and ranks that are not alike."""

from __future__ import annotations

import math
import numbers
import zlib
from collections.abc import Collection, Mapping
from typing import Any

import horovod.torch as hvd
import numpy as np
import torch
from torch import nn

from hvd_dls.errors import DLSError, RanksDisagreeError
from hvd_dls.torch.compressor import instance_of
from hvd_dls.torch.exchange import gather

_AGREE = "hvd_dls.local_steps.agree"  # name of an operation among all ranks


# Arguments --------------------------------------------------------------------------------------


def refuse_arguments(
    model: Any, compression: Any, every: Any, lr: Any, momentum: Any, process_set: Any
) -> None:
    """Raises DLSError for an argument that is not accepted."""
    if not isinstance(model, nn.Module):
        raise DLSError(f"LocalSteps({type(model).__name__}, ...): accepted is a torch.nn.Module")
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise DLSError(f"every={every!r}: accepted is a number of steps from 1")
    if not isinstance(lr, numbers.Real) or not 0 < float(lr) < math.inf:
        raise DLSError(f"lr={lr!r}: accepted is a finite number above 0")
    if not isinstance(momentum, numbers.Real) or not 0 <= float(momentum) < 1:
        raise DLSError(f"momentum={momentum!r}: accepted is a number from 0, below 1")
    if not hvd.is_initialized():
        raise DLSError("LocalSteps before Horovod is initialized: call hvd.init() first")
    if getattr(process_set, "process_set_id", None) is None:
        raise DLSError(
            f"process_set={process_set!r}: accepted is an hvd.ProcessSet that Horovod knows, by "
            "hvd.add_process_set(...) or hvd.init(process_sets=[...])"
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise DLSError("LocalSteps of a model without parameters that are trained")
    _refuse_compression(compression)


def _refuse_compression(compression: Any) -> None:
    if not (hasattr(compression, "compress") and hasattr(compression, "decompress")):
        raise DLSError(
            f"LocalSteps(model, {type(compression).__name__}, ...): accepted is a DLSCompressor, "
            "as DLSCompressor(density=0.05), or one of hvd.Compression; the optimizer of local "
            "steps is not passed"
        )
    compressor = instance_of(compression)
    if compressor is None:
        return
    if compressor.config.adam:
        raise DLSError(
            f"adam={compressor.config.adam} in DLSCompressor is for gradients, and LocalSteps "
            "exchanges changes of weights: have torch.optim.AdamW take the local steps"
        )
    for option, value in (
        ("loss_scale", compressor._loss_scale),
        ("named_parameters", compressor._given),
    ):
        if value is not None:
            raise DLSError(
                f"{option} in DLSCompressor is for gradients of the model, and LocalSteps "
                "exchanges changes of its weights: leave it out"
            )


# Ranks ------------------------------------------------------------------------------------------


def refuse_other_models(tensors: Mapping[str, torch.Tensor], process_set: hvd.ProcessSet) -> None:
    """Raises RanksDisagreeError, on all ranks, if they do not have tensors of the same kinds."""
    told = [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]
    alike = _gather([len(told), zlib.crc32(repr(told).encode())], process_set)
    if (alike != alike[0]).any():
        raise RanksDisagreeError(
            "LocalSteps: the ranks' models differ in names, shapes or types of parameters or "
            "buffers, in their order, or in what is frozen; of parameters and buffers they have "
            f"{alike[:, 0].tolist()}, in the order of ranks"
        )


def refuse_other_ranks(
    every: int,
    optimizer: Any,
    weights: Collection[torch.Tensor],
    doubts: bool,
    process_set: hvd.ProcessSet,
) -> None:
    """Raises RanksDisagreeError, on all ranks, if they differ in what must be alike.

    Args:
        every: steps of a round.
        optimizer: of the common weights.
        weights: in common; they are compared if a rank doubts them.
        doubts: whether this one does.
        process_set: the ranks.
    """
    options = [{k: group[k] for k in optimizer.defaults} for group in optimizer.param_groups]
    checksum = _checksum(weights) if doubts else 0
    own = [every, zlib.crc32(repr(options).encode()), doubts, checksum]
    everys, of_options, doubting, checksums = _gather(own, process_set).T
    if (everys != everys[0]).any():
        raise RanksDisagreeError(
            f"LocalSteps has a different every on ranks: {everys.tolist()}, in the order of ranks; "
            "make it alike on all of them"
        )
    if (of_options != of_options[0]).any():
        raise RanksDisagreeError(
            "the options of LocalSteps' optimizer (lr, momentum) differ between ranks, so their "
            f"weights would; here they are {options}. What changes them has to do it on all ranks "
            "alike, after the same round"
        )
    if doubting.any() and not doubting.all():
        checksums = _gather([_checksum(weights)], process_set)
    if (checksums != checksums[0]).any():
        raise RanksDisagreeError(
            "LocalSteps: the ranks' common weights differ. After workers have come or gone, "
            "hvd.elastic.TorchState must know of it: TorchState(model=model, ..., rounds=rounds); "
            "after an exception in an exchange on some rank, call rounds.restart() on all"
        )


def _checksum(weights: Collection[torch.Tensor]) -> int:
    checksum = 0
    for weight in weights:
        checksum = zlib.crc32(weight.detach().cpu().numpy().tobytes(), checksum)
    return checksum


def _gather(numbers: list[int], process_set: hvd.ProcessSet) -> np.ndarray:
    """(ranks, numbers) int64, in the order of ranks."""
    own = np.array(numbers, np.int64).view(np.uint8)
    return gather(_AGREE, own, process_set).view(np.int64).reshape(-1, len(numbers))
