"""``advise`` for ``horovod.torch``: steps of a model with each kind of compression, in turn."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable
from typing import Any

import horovod.torch as hvd
import numpy as np
import torch
from torch import nn

from hvd_dls.advice.advice import Advice
from hvd_dls.advice.candidates import Candidate
from hvd_dls.advice.lab import Lab, Subject, Trial
from hvd_dls.advice.plan import Plan, plan_of
from hvd_dls.advice.trying import find_out
from hvd_dls.core.session.stats import Stats
from hvd_dls.core.wire.agreement import Facts
from hvd_dls.errors import DLSError
from hvd_dls.torch.compressor import DLSCompressor
from hvd_dls.torch.exchange import finish, gather
from hvd_dls.torch.synthetic import ShapesOnly

Step = Callable[[Any], torch.Tensor]
MakeOptimizer = Callable[[Iterable[torch.Tensor]], torch.optim.Optimizer]


def advise(
    model: nn.Module,
    step: Step,
    *,
    optimizer: MakeOptimizer | None = None,
    quiet: bool = False,
    **options: Any,
) -> Advice:
    """Tries dense, fp16 and DLS in this job, and says which to take; to be called on all ranks.

    Takes a minute or so, and memory: each DLS candidate remembers as much as the gradients take.
    Model and weights stay as they are: copies are trained.

    Args:
        model: whose parameters are trained.
        step: takes a model, which is a copy of this one, and returns its loss for a new batch, as
            in training; ``backward`` is not called in it.
        optimizer: makes torch's optimizer from parameters, so that the time of its update counts,
            too; None: plain SGD with a learning rate of 0.
        quiet: say nothing meanwhile.
        **options: see ``hvd_dls.advice.plan.Plan``.

    Returns:
        The advice: ``print`` it; ``.recommended.code`` is what to write.

    Raises:
        RanksDisagreeError: models or options differ between ranks; on all of them alike.
        DLSError: an option is not accepted, there is one rank only, or the first step failed on
            some rank; on all of them alike.

    Example:
        >>> from hvd_dls.torch import advise
        >>> loss_of = lambda model: cross_entropy(model(images), labels)
        >>> print(advise(model, loss_of))
    """

    def prepare() -> tuple[Plan, Subject]:
        return plan_of(options), subject_of(model, step, optimizer)

    def say(text: str) -> None:
        if not quiet:
            print(f"hvd-dls advise: {text}", file=sys.stderr, flush=True)

    return find_out(make_lab(), prepare, say)


def make_lab() -> Lab:
    """This process among all of the job; after ``hvd.init()``."""
    return TorchLab()


def subject_of(model: nn.Module, step: Step, optimizer: MakeOptimizer | None = None) -> Subject:
    """A model to try; see ``advise``."""
    return TorchSubject(model, step, optimizer)


def subject_of_shapes(shapes: list[tuple[int, ...]], seconds: float, busy: bool) -> Subject:
    """A model of which only shapes are known; see ``ShapesOnly``."""
    return TorchSubject(ShapesOnly(shapes, seconds, busy), lambda model: model())


class TorchLab(Lab):
    """This process among all of the job."""

    def __init__(self) -> None:
        self.rank, self.size = hvd.rank(), hvd.size()
        self.local_size, self.cross_size = hvd.local_size(), hvd.cross_size()

    def gather(self, name: str, array: np.ndarray) -> np.ndarray:
        return gather(name, array, hvd.global_process_set)

    def operate(self, operation: str, length: int) -> None:
        name = f"hvd_dls.advise.{operation}.{length}"
        if operation == "allgather":
            finish(hvd.allgather_async(torch.zeros(length, dtype=torch.uint8), name=name))
            return
        dtype = torch.float16 if operation.endswith("float16") else torch.float32
        finish(hvd.allreduce_async(torch.zeros(length // dtype.itemsize, dtype=dtype), name=name))


class TorchSubject(Subject):
    """A model and what makes its loss.

    Args:
        model, step, optimizer: see ``advise``.

    Raises:
        DLSError: the model cannot be copied, or has nothing to train.
    """

    def __init__(
        self, model: nn.Module, step: Step, optimizer: MakeOptimizer | None = None
    ) -> None:
        self._step = step
        self._make_optimizer = optimizer or (lambda parameters: torch.optim.SGD(parameters, lr=0.0))
        try:
            self._model = copy.deepcopy(model)
        except Exception as error:
            raise DLSError(
                f"the model cannot be copied, and is not to be changed: {error}"
            ) from error
        self._trained = [(n, p) for n, p in self._model.named_parameters() if p.requires_grad]
        if not self._trained:
            raise DLSError("the model has no parameter that is trained")

    def facts(self) -> Facts:
        facts: Facts = [("number of trained parameters", len(self._trained))]
        return facts + [
            (f"parameter {position}", f"{name!r} of shape {tuple(p.shape)}, {p.dtype}")
            for position, (name, p) in enumerate(self._trained)
        ]

    def gradients(self) -> list[tuple[int, int]]:
        return [(p.numel(), p.element_size()) for _, p in self._trained]

    def trial(self, candidate: Candidate) -> TorchTrial:
        # Parameters of its own, for Horovod's hooks, in the same memory.
        shared: dict[int, Any] = {id(buffer): buffer for buffer in self._model.buffers()}
        for parameter in self._model.parameters():
            twin = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
            shared[id(parameter)] = twin
        return TorchTrial(
            candidate, copy.deepcopy(self._model, shared), self._step, self._make_optimizer
        )


class TorchTrial(Trial):
    """Steps of a copy of the model.

    Args:
        candidate: how gradients are exchanged.
        model: the copy.
        step: returns its loss.
        make_optimizer: from its parameters.
    """

    def __init__(
        self, candidate: Candidate, model: nn.Module, step: Step, make_optimizer: MakeOptimizer
    ) -> None:
        self._model, self._step = model, step
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._optimizer: Any = make_optimizer(self._parameters)
        self._compression: DLSCompressor | None = None
        if candidate.method != "alone":
            compression: Any = getattr(
                hvd.Compression, "fp16" if candidate.method == "fp16" else "none"
            )
            if candidate.method == "dls":
                compression = self._compression = DLSCompressor(**candidate.options)
            named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
            self._optimizer = hvd.DistributedOptimizer(
                self._optimizer, named_parameters=named, compression=compression
            )

    def step(self) -> None:
        self.rest()
        loss = self._step(self._model)
        if not isinstance(loss, torch.Tensor):
            raise DLSError(f"step(model) returned {type(loss).__name__}: accepted is the loss")
        loss.backward()
        if all(parameter.grad is None for parameter in self._parameters):
            raise DLSError(
                "step(model) gave the model that it was called with no gradient: the loss must be "
                "of this model, a copy, not of the one in the script"
            )
        self._optimizer.step()

    def wait(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def rest(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def stats(self, window: int) -> Stats | None:
        if self._compression is None:
            return None
        stats: Stats | None = self._compression.stats(window)
        return stats
