"""Elastic training: ``hvd.elastic.TorchState`` keeps a compressor's state with its optimizer's.

Horovod's registry has a handler for each type that a ``TorchState`` knows.  There are three more,
so that scripts need no other line: for Horovod's optimizers with a ``DLSCompressor``, and for
compressors and ``LocalSteps`` that are given to the state.  As objects without a handler, they
would have no way back to a commit, and rank 0's residuals would be copied to all ranks.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from horovod.torch.elastic.state import (
    OptimizerStateHandler,
    StateHandler,
    get_handler_registry,
    set_handler_registry,
)
from horovod.torch.functions import broadcast_object

from hvd_dls.adapter.elastic import Commit
from hvd_dls.torch.bookkeeping import forget_step
from hvd_dls.torch.compressor import DLSCompressor, compressor_of, instance_of
from hvd_dls.torch.local_steps import LocalSteps


def install() -> None:
    """Adds the handlers to Horovod's, before those that would take the same types."""
    ours = [
        (_Compressor, CompressorHandler),
        (_Optimizer, OptimizerHandler),
        (LocalSteps, LocalStepsHandler),
    ]
    others = [entry for entry in get_handler_registry() if entry not in ours]
    set_handler_registry([*ours, *others])


class _Compressors(type):
    def __instancecheck__(cls, value: Any) -> bool:
        return instance_of(value) is not None


class _Compressor(metaclass=_Compressors):
    """In Horovod's registry: instances of ``DLSCompressor``, and the class itself."""


class _Optimizers(type):
    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, torch.optim.Optimizer) and compressor_of(value) is not None


class _Optimizer(metaclass=_Optimizers):
    """In Horovod's registry: its optimizers that have a ``DLSCompressor``."""


class CompressorHandler(StateHandler):
    """Saves and restores what a compressor remembers.

    Args:
        compression: a ``DLSCompressor``, or the class.
    """

    def __init__(self, compression: Any) -> None:
        super().__init__(compression)
        self._commits = _commits(instance_of(compression))

    def save(self) -> None:
        """See ``Commit.save``."""
        for commit in self._commits:
            commit.save()

    def restore(self) -> None:
        """See ``Commit.restore``; Horovod's optimizers forget a step in progress, too."""
        for commit in self._commits:
            commit.restore()

    def sync(self) -> None:
        """See ``Commit.sync``."""
        for commit in self._commits:
            commit.sync(_broadcast)

    def set_value(self, value: Any) -> None:
        """Another compressor takes the place of the one before, and is committed as it is."""
        self.value, self._commits = value, _commits(instance_of(value))


class OptimizerHandler(OptimizerStateHandler):
    """Saves and restores an optimizer's state, and what its compressor remembers.

    Args:
        optimizer: Horovod's.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(optimizer)
        self._of_compressor = CompressorHandler(compressor_of(optimizer))

    def save(self) -> None:
        """Commits both."""
        super().save()
        self._of_compressor.save()

    def restore(self) -> None:
        """Goes back to the last commit of both."""
        super().restore()
        if hasattr(self.value, "_group_counts"):
            forget_step(self.value)  # Horovod's own method leaves counts of groups as they are
        self._of_compressor.restore()

    def sync(self) -> None:
        """Optimizer states follow rank 0's; of the compressor's, see ``Commit.sync``."""
        super().sync()
        self._of_compressor.sync()

    def set_value(self, value: Any) -> None:
        """Another optimizer takes the place of the one before."""
        self._of_compressor.set_value(compressor_of(value))
        super().set_value(value)


class LocalStepsHandler(StateHandler):
    """Saves and restores the common weights of local steps, and what their compressor remembers.

    Each of these begins a round: of one in progress, nothing is kept.

    Args:
        rounds: of the model that the state has, too.
    """

    def __init__(self, rounds: LocalSteps) -> None:
        super().__init__(rounds)
        self.save()

    def save(self) -> None:
        """Commits both."""
        self._state = copy.deepcopy(self.value.state_dict())
        self._of_optimizer = _handler_of(self.value.optimizer)

    def restore(self) -> None:
        """Goes back to the last commit of both."""
        self._of_optimizer.restore()
        self.value.load_state_dict(copy.deepcopy(self._state))

    def sync(self) -> None:
        """All begin with rank 0's common weights; of the compressor, see ``Commit.sync``."""
        self._of_optimizer.sync()
        self.value.follow_first()
        self.save()

    def set_value(self, value: LocalSteps) -> None:
        """Others take the place of those before, and are committed as they are."""
        self.value = value
        self.save()


def _handler_of(optimizer: torch.optim.Optimizer) -> OptimizerStateHandler:
    """Of one of Horovod's optimizers, with a compressor of this package or without."""
    ours = compressor_of(optimizer) is not None
    return OptimizerHandler(optimizer) if ours else OptimizerStateHandler(optimizer)


def _commits(compressor: DLSCompressor | None) -> list[Commit]:
    """None of none: another optimizer may be without a compressor."""
    return [] if compressor is None else [Commit(compressor)]


def _broadcast(value: Any) -> Any:
    return broadcast_object(value, name="hvd_dls.elastic")
