"""``DistributedOptimizer``: a Keras 3 optimizer that averages gradients over ranks."""

from __future__ import annotations

import logging
from typing import Any

import horovod.tensorflow as hvd
import keras

from hvd_dls.errors import DLSError
from hvd_dls.keras.accumulation import inner_optimizer
from hvd_dls.keras.distributed import Distributed
from hvd_dls.keras.gradient_allreduce import Allreduce
from hvd_dls.keras.reduction import Reduction
from hvd_dls.tensorflow.compressor import DLSCompressor

_log = logging.getLogger("hvd_dls")


def DistributedOptimizer(  # noqa: N802 - Horovod's name
    optimizer: keras.optimizers.Optimizer,
    name: str | None = None,
    device_dense: str = "",
    device_sparse: str = "",
    compression: Any = hvd.Compression.none,
    sparse_as_dense: bool = False,
    gradient_predivide_factor: float = 1.0,
    op: int = hvd.Average,
    backward_passes_per_step: int = 1,
    average_aggregated_gradients: bool = False,
    num_groups: int = 0,
    groups: Any = None,
    process_set: hvd.ProcessSet = hvd.global_process_set,
    scale_local_gradients: bool = True,
) -> keras.optimizers.Optimizer:
    """A Keras 3 optimizer like the given one that first averages gradients over ranks.

    It is saved and loaded as the given one, without Horovod.  If that has state already, the new
    one goes on from it.

    Args:
        optimizer: a Keras 3 optimizer; a LossScaleOptimizer goes inside, not around.
        name: as Horovod's: prefix of operation names.
        device_dense: where Horovod's operations on tensors run; "" leaves it to TensorFlow.
        device_sparse: where those on IndexedSlices run.
        compression: hvd.Compression.none or fp16, or a DLSCompressor, class or instance.
        sparse_as_dense: whether to average IndexedSlices (of embeddings) as dense gradients.
        gradient_predivide_factor: divides before the sum and multiplies after it (Average only).
        op: hvd.Average or hvd.Sum.
        backward_passes_per_step: passes whose gradients are accumulated before they are exchanged
            and applied: sets Keras's ``gradient_accumulation_steps``.
        average_aggregated_gradients: must be true if there are several, as Keras averages them.
        num_groups: as ``groups``.
        groups: only None: gradients are grouped by Horovod's tensor fusion or DLSCompressor.
        process_set: the ranks that exchange gradients.
        scale_local_gradients: only True; no variable's gradients can be left out of the exchange.

    Raises:
        DLSError: another kind of optimizer, or an option Keras 3 cannot be served with.
    """
    _check_optimizer(optimizer)
    if op not in (hvd.Average, hvd.Sum):
        raise DLSError(f"op={op!r}: accepted are hvd.Average and hvd.Sum")
    if gradient_predivide_factor != 1 and op != hvd.Average:
        raise DLSError("gradient_predivide_factor: accepted only with op=hvd.Average")
    if not (hasattr(compression, "compress") and hasattr(compression, "decompress")):
        raise DLSError(
            f"compression={compression!r}: accepted are hvd.Compression.none, hvd.Compression.fp16 "
            "and DLSCompressor"
        )
    _refuse_groups(num_groups, groups)
    if not scale_local_gradients:
        raise DLSError(
            "scale_local_gradients=False: accepted is True; Horovod's local variables, whose "
            "gradients are left out of the exchange, are not supported with Keras 3"
        )
    if backward_passes_per_step != 1:
        _check_passes(optimizer, backward_passes_per_step, average_aggregated_gradients)

    mixed = keras.mixed_precision.dtype_policy().name == "mixed_float16"  # its name since 3.0
    if mixed and not isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)  # as compile() would
    kind = type(optimizer)
    namespace = {"__module__": _public_module(kind)}  # saved and loaded as that class
    distributed: Any = type(kind.__name__, (Distributed, kind), namespace)
    made = distributed.from_config(optimizer.get_config())
    if backward_passes_per_step != 1:
        inner_optimizer(made).gradient_accumulation_steps = backward_passes_per_step
    _refuse_second_momentum(made, compression)
    _warn_of_clipping(made, compression)
    made._reduction = Reduction(
        made,
        name or f"Distributed{kind.__name__}",
        compression,
        sparse_as_dense,
        Allreduce(op, process_set, gradient_predivide_factor, device_dense, device_sparse),
    )
    if optimizer.built:
        made.build(optimizer._trainable_variables)
        for own, given in zip(made.variables, optimizer.variables, strict=True):
            own.assign(given)
    return made


def _check_optimizer(optimizer: Any) -> None:
    if isinstance(optimizer, str):
        raise DLSError(
            f"optimizer={optimizer!r}: accepted is an optimizer, not its name; pass "
            f"keras.optimizers.get({optimizer!r})"
        )
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise DLSError(
            f"{type(optimizer).__module__}.{type(optimizer).__name__} is no Keras 3 optimizer; for "
            "tf_keras use Horovod's own DistributedOptimizer with the same compression"
        )
    if isinstance(optimizer, Distributed):
        raise DLSError("the optimizer is a DistributedOptimizer already")


def _refuse_groups(num_groups: int, groups: Any) -> None:
    if not num_groups and groups is None:
        return
    given = f"num_groups={num_groups}" if groups is None else f"groups={groups!r}"
    raise DLSError(
        f"{given}: gradients cannot be grouped by hand with Keras 3. They travel together without "
        "it: by Horovod's tensor fusion (HOROVOD_FUSION_THRESHOLD), or with DLSCompressor in "
        "buckets of bucket_bytes"
    )


def _check_passes(optimizer: Any, passes: int, average: bool) -> None:
    if not isinstance(passes, int) or isinstance(passes, bool) or passes < 1:
        raise DLSError(f"backward_passes_per_step={passes!r}: accepted is an integer >= 1")
    given = f"backward_passes_per_step={passes}"
    theirs = inner_optimizer(optimizer).gradient_accumulation_steps
    if theirs:
        raise DLSError(
            f"{given}: the optimizer has gradient_accumulation_steps={theirs} already, which is "
            "Keras's name for the same; pass one of them"
        )
    if not average:
        raise DLSError(
            f"{given} adds up the gradients of {passes} passes, but Keras 3 averages them: pass "
            "average_aggregated_gradients=True (or gradient_accumulation_steps="
            f"{passes} to the optimizer), and for plain SGD a learning rate {passes} times as high"
        )
    if optimizer.built:
        raise DLSError(
            f"{given}: the optimizer has state already, but none for accumulated gradients; make "
            f"it with gradient_accumulation_steps={passes}"
        )


def _refuse_second_momentum(optimizer: Any, compression: Any) -> None:
    config = getattr(compression, "config", None)
    if config is not None and config.adam:
        _refuse_all_but_sgd(inner_optimizer(optimizer), config)
    if config is None or not config.momentum:
        return
    for theirs in ("momentum", "beta_1"):  # of SGD; of Adam and its like
        if value := getattr(inner_optimizer(optimizer), theirs, 0):
            raise DLSError(
                f"momentum={config.momentum} in DLSCompressor takes the place of the optimizer's, "
                f"which has {theirs}={value}: make it with {theirs}=0"
            )


def _warn_of_clipping(optimizer: Any, compression: Any) -> None:
    """Says so if the optimizer clips what arrives: the rest of it arrives later."""
    config = getattr(compression, "config", None)
    if config is None and compression is not DLSCompressor:
        return
    instead = {
        "clipnorm": "clip_norm",
        "clipvalue": "clip_value",
        "global_clipnorm": "clip_global_norm",
    }
    for theirs, ours in instead.items():
        if limit := getattr(inner_optimizer(optimizer), theirs, None):
            _log.warning(
                "the optimizer has %s=%s, which clips sparse sums behind the exchange: too late, "
                "as what waits brings the rest in later steps. Leave it out, and give "
                "DLSCompressor %s=%s, which clips each rank's gradient before",
                *(theirs, limit, ours, limit),
            )


def _refuse_all_but_sgd(optimizer: Any, config: Any) -> None:
    momentum = getattr(optimizer, "momentum", 0)
    if isinstance(optimizer, keras.optimizers.SGD) and not momentum:
        return
    given = type(optimizer).__name__ + (f" with momentum={momentum}" if momentum else "")
    raise DLSError(
        f"adam={config.adam} in DLSCompressor makes Adam's updates before they are sent, so the "
        f"optimizer must be plain keras.optimizers.SGD, and it is {given}: make it with "
        "Adam's learning rate times the root of the number of ranks, and weight_decay divided by "
        "it (which is decoupled, as AdamW's)"
    )


def _public_module(kind: type) -> str:
    """Module under which Keras finds the class again when a saved model is loaded."""
    public = getattr(keras.optimizers, kind.__name__, None) is kind
    return "keras.optimizers" if public else kind.__module__
