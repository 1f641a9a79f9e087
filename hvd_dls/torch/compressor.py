"""The compressor for ``horovod.torch``: ``compression=DLSCompressor``."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import horovod.torch as hvd
import torch
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.weak import TensorWeakRef

from hvd_dls.adapter import BaseCompressor, InstanceOrDefault
from hvd_dls.errors import DLSError
from hvd_dls.torch.binding import Binding, Dense, InFlight, send_dense

_log = logging.getLogger("hvd_dls")


class DLSCompressor(BaseCompressor):
    """Dynamic layer-wise sparsification for ``horovod.torch``.

    Sends each step the largest entries of each layer's accumulated gradient and keeps the rest for
    later (error feedback).  How many a layer sends moves, step after step, until all layers share
    one threshold.

    Pass the class itself, or an instance with options.  Parameters are found at the end of the
    first step, which is therefore dense; given ``named_parameters``, the first step is sparse too.

    Args:
        named_parameters: (name, parameter) in model order, ``model.named_parameters()``; None to
            take them from the optimizer.
        process_set: the ranks that exchange gradients, if ``named_parameters`` is given; otherwise
            the optimizer's is taken.
        loss_scale: with a ``torch.amp.GradScaler``, its ``get_scale``.
        **options: see ``DLSConfig``.

    Raises:
        DLSError: an option that does not exist or a value that is not accepted.

    Example:
        >>> optimizer = hvd.DistributedOptimizer(
        ...     optimizer, named_parameters=model.named_parameters(),
        ...     compression=DLSCompressor(density=0.001))
    """

    _bindings: list[Binding]

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, torch.nn.Parameter]] | None = None,
        *,
        process_set: hvd.ProcessSet = hvd.global_process_set,
        loss_scale: Callable[[], float] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(loss_scale=loss_scale, **options)
        self._known: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self._unclaimed: dict[int, TensorWeakRef] = {}  # by id, of gradients that still exist
        self._told_of_strangers = False
        self._lock = threading.Lock()  # backward has a thread for each device
        if named_parameters is not None:
            self._add(Binding(named_parameters, self.config, process_set))

    # What Horovod calls -------------------------------------------------------------------------

    @InstanceOrDefault
    def compress(self, tensor: torch.Tensor) -> tuple[torch.Tensor, InFlight | Dense]:
        """Called by Horovod with a gradient; returns what it allreduces, and a context.

        Raises:
            DLSError: the ranks have different options or parameters, or the density is too low
                for the model; on every rank alike.
        """
        with self._lock:
            for binding in self._bindings:
                name = binding.name_of(tensor)
                if name is not None:
                    return binding.compress(name, tensor)
        self._unclaimed[id(tensor)] = TensorWeakRef(tensor)
        if self._bindings and not self._told_of_strangers:
            self._told_of_strangers = True
            _log.warning(
                "a gradient of shape %s belongs to no known parameter; it goes dense, as will "
                "others like it (said once)",
                tuple(tensor.shape),
            )
        return send_dense(tensor)

    @InstanceOrDefault
    def decompress(self, tensor: torch.Tensor, ctx: InFlight | Dense | None) -> torch.Tensor:
        """Called by Horovod with what came back and the context; returns the reduced gradient.

        Raises:
            NonFiniteGradientError: some rank's gradient held NaN or Inf; on every rank alike.
        """
        if ctx is None:  # a sparse gradient, which Horovod never gave to compress
            return tensor
        if isinstance(ctx, InFlight):
            return ctx.binding.decompress(tensor, ctx)
        if ctx.binding is not None:
            return ctx.binding.decompress_dense(tensor, ctx)
        return tensor.to(ctx.dtype)

    # Finding the parameters ---------------------------------------------------------------------

    def _before_step(self, optimizer: Any) -> None:
        """Waits for what is on its way; refuses what would drift apart or cannot be compressed.

        In this order: a rank that is refused may end, and with it Horovod on all of them; the
        others get their own refusal only if they have what they wait for.

        Args:
            optimizer: Horovod's, with the attributes that Horovod's torch/optimizer.py gives it.
        """
        if not hasattr(optimizer, "op") or (optimizer.op == hvd.Adasum and hvd.size() > 1):
            raise DLSError(
                "op=hvd.Adasum: accepted are hvd.Average and hvd.Sum (Adasum combines whole "
                "updates, which cannot be sent in part)"
            )
        for binding in self._bindings:
            binding.wait()
        if self.config.momentum:
            self._refuse_second_momentum(optimizer)
        if optimizer in self._known:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None and parameter not in optimizer._requires_update:
                        self._refuse_unreduced(optimizer, parameter)
        for binding in self._bindings:
            if binding.refused and not binding.owns_none_of(optimizer._requires_update):
                # Without gradients a step changes nothing, neither weights nor the optimizer's
                # state.  The hook runs once more behind Horovod's synchronize, before the update.
                for parameter in optimizer._requires_update:
                    parameter.grad = None

    def _after_step(self, optimizer: Any) -> None:
        """Takes over the parameters of an optimizer whose gradients have passed ``compress``.

        After the step, because Horovod compresses the gradients of parameters that took no part
        only in the step itself; by then some ranks must not be ahead of others.  A step without
        gradients seen is none of Horovod's: ``hvd.broadcast_optimizer_state`` takes one to fill in
        state, on some ranks only.
        """
        self._unclaimed = {i: ref for i, ref in self._unclaimed.items() if ref() is not None}
        if optimizer in self._known:
            return
        reduced: set[torch.Tensor] = optimizer._requires_update
        bound = {id(p) for binding in self._bindings for p in binding.parameters()}
        if not any(id(p) in bound for p in reduced):
            if not any(id(p.grad) in self._unclaimed for p in reduced):
                return
            names = optimizer._parameter_names
            ordered = [p for group in optimizer.param_groups for p in group["params"]]
            # Sparse gradients (of embeddings) pass us by: they keep Horovod's own sparse path.
            ours = [(names[p], p) for p in ordered if p in reduced and not p.grad.is_sparse]
            self._add(Binding(ours, self.config, optimizer.process_set))
        for parameter in reduced:
            self._unclaimed.pop(id(parameter.grad), None)
        self._known.add(optimizer)

    def _refuse_second_momentum(self, optimizer: Any) -> None:
        if hvd.size() == 1:
            raise DLSError(
                f"momentum={self.config.momentum} in DLSCompressor, but there is one process only, "
                "and then Horovod gives no gradients to a compressor: leave momentum to the "
                "optimizer"
            )
        for group in optimizer.param_groups:
            first, *others = group.get("betas") or (0.0,)  # of Adam and its like
            if group.get("momentum"):
                theirs, instead = f"momentum={group['momentum']}", "momentum=0"
            elif first:
                theirs, instead = f"betas={group['betas']}", f"betas={(0.0, *others)}"
            else:
                continue
            raise DLSError(
                f"momentum={self.config.momentum} in DLSCompressor takes the place of the "
                f"optimizer's, which has {theirs}: make it with {instead}"
            )

    @staticmethod
    def _refuse_unreduced(optimizer: Any, parameter: torch.Tensor) -> None:
        name = optimizer._parameter_names.get(parameter, "without a name")
        raise DLSError(
            f"parameter {name!r} of shape {tuple(parameter.shape)} was added or unfrozen after "
            "hvd.DistributedOptimizer was made: Horovod does not reduce its gradient, and the "
            "ranks would drift apart. Add and unfreeze parameters before wrapping the optimizer"
        )


def _compressor_of(optimizer: torch.optim.Optimizer) -> DLSCompressor | None:
    compression = getattr(optimizer, "_compression", None)
    if isinstance(compression, type) and issubclass(compression, DLSCompressor):
        compression = compression._default()
    return compression if isinstance(compression, DLSCompressor) else None


def _on_step_begin(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if compressor := _compressor_of(optimizer):
        compressor._before_step(optimizer)


def _on_step_end(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if compressor := _compressor_of(optimizer):
        compressor._after_step(optimizer)


register_optimizer_step_pre_hook(_on_step_begin)
register_optimizer_step_post_hook(_on_step_end)
