"""Local steps: ranks train alone, and now and then exchange what that has changed.

A rank takes a round of steps with an optimizer of its own.  Then what they have changed, which is
the weights of the round's begin less those of its end, is a gradient: compressed, averaged, and
applied to the common weights by SGD, with which the next round begins (DiLoCo, arXiv:2311.08105;
with sparse changes and error feedback as in SparseLoCo, arXiv:2508.15706).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import horovod.torch as hvd
import torch
from torch import nn

from hvd_dls.adapter import epoch, is_elastic
from hvd_dls.errors import DLSError, NonFiniteGradientError
from hvd_dls.torch.bookkeeping import forget_step, hand_over_rest, reductions_in, wait_for
from hvd_dls.torch.compressor import DLSCompressor, instance_of
from hvd_dls.torch.local_refusals import (
    refuse_arguments,
    refuse_other_models,
    refuse_other_ranks,
)

# Names of operations among all ranks.
_BEGIN, _BUFFERS = "hvd_dls.local_steps.begin", "hvd_dls.local_steps.buffers"


class LocalSteps:
    """Trains with an exchange every few steps, behind any optimizer of the rank's own.

    To be made on all ranks, when Horovod is initialized and the model is on its device: parameters
    and buffers become rank 0's, as torch's DistributedDataParallel does it (in an elastic job, when
    the state that has both is synchronised).  The optimizer is plain, not
    ``hvd.DistributedOptimizer``.  After each round all ranks hold the same weights, to the bit;
    within a round each has its own.  With one process nothing is changed.

    Args:
        model: whose parameters are exchanged; of its buffers, such as batch norm's statistics,
            those in floating point are averaged, dense.
        compression: of the changes: a DLSCompressor, instance or class, or one of
            ``hvd.Compression``.  Its steps are rounds, ``warmup_steps``, too.
        every: steps of a round.
        lr: factor on the averaged change.  Sparse changes want more than dense ones, since what
            waits comes late: see docs/local-steps.md.
        momentum: Nesterov's, of rounds; with a sparse compression 0 has been best.
        process_set: the ranks that train together.

    Attributes:
        optimizer: Horovod's, of the common weights: for a schedule of ``lr``.
        compression: as given.
        every: as given, and may be changed between rounds, on all ranks alike.

    Raises:
        RanksDisagreeError: the ranks' models differ; on every rank alike.
        DLSError: an argument is not accepted.

    Example:
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        >>> rounds = LocalSteps(model, DLSCompressor(density=0.05), every=8, lr=2.5)
        >>> for images, labels in batches:
        ...     optimizer.zero_grad()
        ...     loss(model(images), labels).backward()
        ...     optimizer.step()
        ...     rounds.step()
    """

    def __init__(
        self,
        model: nn.Module,
        compression: Any = DLSCompressor,
        *,
        every: int = 8,
        lr: float = 1.0,
        momentum: float = 0.0,
        process_set: hvd.ProcessSet = hvd.global_process_set,
    ) -> None:
        refuse_arguments(model, compression, every, lr, momentum, process_set)
        self.compression, self.every, self._process_set = compression, every, process_set
        self._model, self._taken, self._epoch = model, 0, None
        self._begun: tuple[Any, list[int]] | None = None  # when, and reductions, of an exchange
        self._own = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if not is_elastic():  # those who were there before are in their state's sync()
            self._broadcast({**self._own, **dict(model.named_buffers()), **self._frozen()})
        self._common = {name: nn.Parameter(_start_of(p)) for name, p in self._own.items()}
        sgd = torch.optim.SGD(self._common.values(), lr, momentum, nesterov=momentum > 0)
        self.optimizer: Any = hvd.DistributedOptimizer(
            sgd,
            named_parameters=self._common.items(),
            compression=compression,
            process_set=process_set,
        )
        self.optimizer._of_local_steps = True  # which join() refuses
        self._begin()

    # A round ------------------------------------------------------------------------------------

    def step(self) -> bool:
        """To be called after each step of the optimizer; ends a round when it is due.

        A rank without data may call it without a step, so that others have not to wait.

        Returns:
            Whether a round has ended: then the weights are those of all ranks, to be evaluated or
            saved.

        Raises:
            RanksDisagreeError: the ranks have different weights in common, rounds of different
                lengths or options of the optimizer, or one has given the exchange up; on every
                rank alike.
            NonFiniteGradientError: a rank's weights hold NaN or Inf, with nonfinite="raise"; on
                every rank alike.
            DLSError: a parameter was added or unfrozen since this object was made.
        """
        self._taken += 1
        if self._taken < self.every:
            return False
        self.finish()
        return True

    @torch.inference_mode(False)
    def finish(self) -> None:
        """Ends a round now, however many steps it has had: on all ranks, after the last step.

        Whatever error ends it, weights and averaged buffers are then those of the round's begin.

        Raises:
            DLSError: see ``step``.
        """
        self._taken = 0
        if not self._process_set.included():
            return
        try:
            if self._process_set.size() > 1:
                self._leave_last()
                self._exchange()
            else:
                self._become_common()
        except NonFiniteGradientError as error:
            self._go_back()
            raise NonFiniteGradientError(error.where, error.of_hosts, local_steps=True) from None
        except BaseException:
            self._go_back()
            raise
        self._begin()
        self._refuse_new_parameters()  # when no other rank waits for this one

    def _exchange(self) -> None:
        changes = {}
        for name, weight in self._common.items():
            own = self._own[name].detach()
            weight.requires_grad_(self._own[name].requires_grad)  # or it was frozen meanwhile
            weight.grad = None  # an interrupt may have left one
            if weight.requires_grad:
                changes[weight] = (weight.detach().to(own.dtype) - own).to(weight.dtype)
        buffers, flat = self._averaged(), self._finite_buffers()
        common, doubts = self._common.values(), self._epoch is not epoch()
        refuse_other_ranks(self.every, self.optimizer, common, doubts, self._process_set)
        # From here on others wait for this rank.  Buffers first, as no error of the rest may keep
        # some rank from them.
        self._begun = epoch(), []
        if buffers:
            handle = hvd.allreduce_async_(flat, name=_BUFFERS, process_set=self._process_set)
            self._begun[1].append(handle)
        # A backward pass through nothing but the weights: all goes Horovod's usual way, and this
        # rank waits asleep, while Horovod's own wait, for what is handed over late, would spin.
        if changes:
            torch.autograd.backward(list(changes), list(changes.values()))
        changes.clear()
        self.optimizer.step()
        for weight in common:
            weight.grad = None
        if buffers:
            parts = hvd.synchronize(handle).split([b.numel() for b in buffers.values()])
            with torch.no_grad():
                for buffer, part in zip(buffers.values(), parts, strict=True):
                    buffer.copy_(part.view(buffer.shape))
        self._begun, self._epoch = None, epoch()

    def _leave_last(self) -> None:
        """Ends an exchange that an error has left halfway, as others may wait for this rank."""
        if self._begun is None:
            return
        begun, handles = self._begun
        optimizer, compressor = self.optimizer, instance_of(self.compression)
        record = optimizer._handles
        if begun is epoch():
            binding = compressor and compressor.binding_if_known(optimizer)
            if binding:
                binding.abandon()
            elif compressor is None and record:
                hand_over_rest(optimizer, record, ())
        forget_step(optimizer)
        if begun is epoch():
            wait_for([*reductions_in(record), *handles])
        self._begun = None

    def _averaged(self) -> dict[str, torch.Tensor]:
        """The buffers that are averaged."""
        return {n: b for n, b in self._model.named_buffers() if b.is_floating_point()}

    @torch.no_grad()
    def _finite_buffers(self) -> torch.Tensor:
        """All of them, as one, in float64: what is alike on all ranks stays as it is, to the bit.

        Where a buffer holds NaN or Inf (statistics of a batch whose step was skipped, say), that of
        the round's begin.
        """
        parts = [torch.zeros(0, dtype=torch.float64)]
        for name, buffer in self._averaged().items():
            own, before = buffer.detach().double(), self._buffers.get(name)
            if before is not None and before.shape == own.shape:
                own = own.where(own.isfinite(), before.to(own))
            parts.append(own.flatten())
        return torch.cat([part.to(parts[-1].device) for part in parts])

    @torch.no_grad()
    def _begin(self) -> None:
        """A round begins: the rank's own weights are the common ones."""
        for name, common in self._common.items():
            self._own[name].copy_(common)
        self._buffers = {name: buffer.clone() for name, buffer in self._averaged().items()}

    @torch.no_grad()
    def _go_back(self) -> None:
        """To the round's begin, after an error; who knows how far other ranks have come."""
        self._epoch = None
        for name, buffer in self._averaged().items():
            before = self._buffers.get(name)
            if before is not None and before.shape == buffer.shape:
                buffer.copy_(before)
        self._begin()

    @torch.no_grad()
    def _become_common(self) -> None:
        """With one process, its own weights are all there is."""
        for name, common in self._common.items():
            common.copy_(self._own[name])

    # Agreement ----------------------------------------------------------------------------------

    def restart(self) -> None:
        """A round begins with rank 0's weights, as they are in its model now; on all ranks alike.

        For weights that were loaded into the model after this object was made.  What waits in
        residuals is kept.
        """
        self._taken = 0
        self._broadcast({**self._own, **dict(self._model.named_buffers()), **self._frozen()})
        with torch.no_grad():
            for name, common in self._common.items():
                common.copy_(_start_of(self._own[name]))
        self._begin()

    def follow_first(self) -> None:
        """A round begins with the weights that rank 0 has in common; on all ranks alike."""
        self._taken = 0
        self._broadcast(self._common)
        self._begin()

    def _frozen(self) -> dict[str, torch.Tensor]:
        return {n: p for n, p in self._model.named_parameters() if n not in self._own}

    def _broadcast(self, tensors: Mapping[str, torch.Tensor]) -> None:
        process_set = self._process_set
        if process_set.included() and process_set.size() > 1:
            first = (process_set.ranks or [0])[0]
            refuse_other_models(tensors, process_set)
            for name, tensor in tensors.items():
                whole = tensor.data.contiguous()  # the same memory, if it is that already
                as_bytes = whole.view(-1).view(torch.uint8)  # Horovod knows few types
                hvd.broadcast_(as_bytes, first, f"{_BEGIN}.{name}", process_set)
                if not tensor.is_contiguous():
                    tensor.data.copy_(whole)

    def _refuse_new_parameters(self) -> None:
        for name, parameter in self._model.named_parameters():
            if parameter.requires_grad and self._own.get(name) is not parameter:
                raise DLSError(
                    f"parameter {name!r} of shape {tuple(parameter.shape)} was added, replaced or "
                    "unfrozen after LocalSteps was made, and the ranks have drifted apart in it: "
                    "make LocalSteps afterwards"
                )

    # State --------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The common weights and the rounds' momentum; residuals are the compressor's.

        Of a round in progress nothing is in it, so save after one has ended.
        """
        common = {name: tensor.detach().clone() for name, tensor in self._common.items()}
        return {"common": common, "optimizer": self.optimizer.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on with saved common weights, which become the model's; a round begins.

        Args:
            state: of ``state_dict``.

        Raises:
            DLSError: it is of a model with other parameters; nothing has changed then.
        """
        if not isinstance(state, Mapping) or not {"common", "optimizer"} <= {*state}:
            raise DLSError("load_state_dict: accepted is what state_dict() of LocalSteps has given")
        given = {name: tuple(tensor.shape) for name, tensor in state["common"].items()}
        shapes = {name: tuple(tensor.shape) for name, tensor in self._common.items()}
        if given != shapes:
            different = sorted(n for n in {*given, *shapes} if given.get(n) != shapes.get(n))
            name = different[0]
            raise DLSError(
                f"this state of LocalSteps is of another model: parameter {name!r} has shape "
                f"{given.get(name, 'none')} there and {shapes.get(name, 'none')} here, and "
                f"{len(different) - 1} more differ"
            )
        self.optimizer.load_state_dict(state["optimizer"])
        for name, tensor in state["common"].items():
            self._common[name].copy_(tensor)
        self._taken, self._epoch = 0, None
        self._begin()


def _start_of(parameter: torch.Tensor) -> torch.Tensor:
    """A copy of a weight; of 16 bits in 32, so that small changes add up."""
    start = parameter.detach().clone()
    return start.float() if start.dtype in (torch.float16, torch.bfloat16) else start
