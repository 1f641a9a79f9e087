"""The compressor for ``horovod.torch``: ``compression=DLSCompressor``."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import horovod.torch as hvd
import torch

from hvd_dls.adapter import BaseCompressor, InstanceOrDefault, refuse_number
from hvd_dls.errors import DLSError
from hvd_dls.torch import horovod_frames, watching
from hvd_dls.torch.binding import Binding
from hvd_dls.torch.bookkeeping import forget_step, names_and_parameters, reductions_in, wait_for
from hvd_dls.torch.contexts import Dense, InFlight, send_dense
from hvd_dls.torch.parameters import NamedParameter, Parameters, checked
from hvd_dls.torch.refusals import refuse_optimizer, refuse_process_set

_log = logging.getLogger("hvd_dls")


class DLSCompressor(BaseCompressor):
    """Dynamic layer-wise sparsification for ``horovod.torch``.

    Sends each step the largest entries of each layer's accumulated gradient and keeps the rest for
    later (error feedback).  How many a layer sends moves, step after step, until all layers share
    one threshold.

    Pass the class itself, or an instance with options.  Parameters, their names and the process set
    are those of Horovod's optimizer, which is known at the first gradient.

    Args:
        named_parameters: (name, parameter) in model order, ``model.named_parameters()``, if only
            these are to be compressed, or in this order; None: all of the optimizer's.
        process_set: the ranks that exchange gradients, to be checked; None: the optimizer's.
        loss_scale: with a ``torch.amp.GradScaler``, its ``get_scale``.
        **options: see ``DLSConfig``.

    Raises:
        DLSError: an option that does not exist or a value that is not accepted.

    Examples:
        >>> optimizer = hvd.DistributedOptimizer(
        ...     optimizer, named_parameters=model.named_parameters(),
        ...     compression=DLSCompressor(density=0.001))
    """

    _bindings: list[Binding]

    def __init__(
        self,
        named_parameters: Iterable[NamedParameter] | None = None,
        *,
        process_set: hvd.ProcessSet | None = None,
        loss_scale: Callable[[], float] | None = None,
        **options: Any,
    ) -> None:
        refuse_number(named_parameters, "parameters, as model.named_parameters()")
        refuse_process_set(process_set)
        super().__init__(loss_scale=loss_scale, **options)
        self._given = None if named_parameters is None else Parameters(checked(named_parameters))
        self._process_set = process_set
        self._by_optimizer: weakref.WeakKeyDictionary[Any, Binding] = weakref.WeakKeyDictionary()
        self._told_of_strangers = False
        self._lock = threading.RLock()  # backward has a thread for each device

    # What Horovod calls -------------------------------------------------------------------------

    @InstanceOrDefault
    def compress(self, tensor: torch.Tensor) -> tuple[torch.Tensor, InFlight | Dense]:
        """Called by Horovod with a gradient; returns what it allreduces, and a context.

        Raises:
            RanksDisagreeError: the ranks have different options, parameters or versions; on every
                rank alike.
            DLSError: the density is too low for the model, or the optimizer one that cannot be
                served; on every rank alike.
        """
        calling = horovod_frames.caller()
        if calling is not None:
            with self._lock:
                if watching.current is not None:
                    watching.current.handed_over(calling.optimizer, calling.parameter)
                binding = self.binding_of(calling.optimizer)
                name = (
                    binding.parameters.name_of_gradient(tensor)
                    if calling.parameter is None
                    else binding.parameters.name_of(calling.parameter)
                )
                if name is not None:
                    return binding.compress(calling.optimizer, name, tensor)
        if not self._told_of_strangers:
            self._told_of_strangers = True
            _log.warning(
                "a gradient of shape %s belongs to no known parameter; it goes dense, as will "
                "others like it (said once)",
                tuple(tensor.shape),
            )
        return send_dense(tensor)

    @InstanceOrDefault
    def decompress(
        self, tensor: torch.Tensor | None, ctx: InFlight | Dense | None
    ) -> torch.Tensor | None:
        """Called by Horovod with what came back and the context; returns the reduced gradient.

        Raises:
            NonFiniteGradientError: some rank's gradient held NaN or Inf; on every rank alike.
            RanksDisagreeError: a rank has given the step up, or is in another one.
        """
        if ctx is None:  # a sparse gradient, which Horovod never gave to compress
            return tensor
        if isinstance(ctx, InFlight):
            return ctx.binding.decompress(tensor, ctx)
        if ctx.binding is not None:
            return ctx.binding.decompress_dense(tensor, ctx)
        return (ctx.whole if tensor is None else tensor).to(ctx.dtype)

    @InstanceOrDefault
    def abandon_step(self) -> None:
        """See ``BaseCompressor``; Horovod's optimizers forget the step, too."""
        for binding in self._bindings:
            binding.abandon()
        for optimizer in list(self._by_optimizer):  # also where no gradient has come that far
            record = optimizer._handles
            forget_step(optimizer)
            wait_for(reductions_in(record))

    # Finding the parameters ---------------------------------------------------------------------

    def binding_of(self, optimizer: Any) -> Binding:
        """The model that an optimizer updates.

        Args:
            optimizer: Horovod's, with the attributes that Horovod's torch/optimizer.py gives it.

        Raises:
            DLSError: see ``refuse_optimizer``.
        """
        binding = self._by_optimizer.get(optimizer)
        if binding is None:
            refuse_optimizer(optimizer, self.config, self._process_set)
            ours = self._parameters_of(optimizer)
            same = (b for b in self._bindings if b.parameters.is_same_set(p for _, p in ours))
            binding = next(same, None)
            if binding is None:
                binding = Binding(ours, self.config)
                self._add(binding)
            self._by_optimizer[optimizer] = binding
        return binding

    def binding_if_known(self, optimizer: Any) -> Binding | None:
        """The model that an optimizer updates, if one of its gradients has come in."""
        return self._by_optimizer.get(optimizer)

    def _parameters_of(self, optimizer: Any) -> list[NamedParameter]:
        ours = names_and_parameters(optimizer)
        if self._given is None:
            return ours
        reduced = {id(parameter) for _, parameter in ours}
        theirs = [(name, p) for name, p in self._given.named() if id(p) in reduced]
        if self.config.adam and len(theirs) < len(ours):
            raise DLSError(
                f"adam={self.config.adam}: the optimizer has {len(ours)} parameters, of which "
                f"DLSCompressor was given {len(theirs)}; the others would go without Adam. Give it "
                "all, or none"
            )
        return theirs

    def _bound_to(self) -> str:
        if self._given is not None:
            return "named_parameters"
        return "a process_set" if self._process_set is not None else super()._bound_to()


def instance_of(compression: Any) -> DLSCompressor | None:
    """The compressor that was passed as ``compression``; None if it is none of this package."""
    if isinstance(compression, type) and issubclass(compression, DLSCompressor):
        compression = compression._default()
    return compression if isinstance(compression, DLSCompressor) else None


def compressor_of(optimizer: Any) -> DLSCompressor | None:
    """The compressor of one of Horovod's optimizers; None if it has none of this package."""
    return instance_of(getattr(optimizer, "_compression", None))
