"""The errors a user can meet.  Each message names the layer or option, what was seen and wanted."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


class DLSError(ValueError):
    """Wrong input or use: an option, a layer or a combination that cannot work."""


class PayloadError(DLSError):
    """A gathered payload is malformed or does not belong to this layer and configuration."""


class RanksDisagreeError(DLSError):
    """Ranks have other options, models or versions than each other, or are in different steps.

    Raised on every rank that sees it; the message names the rank and the first difference.
    """


class StateMismatchError(DLSError):
    """A saved state belongs to other layers, another configuration or rank, or is damaged."""


class CheckpointError(DLSError):
    """A checkpoint could not be written or read; on every rank alike.

    The message names the rank or file, and what went wrong there.
    """


class NonFiniteGradientError(ArithmeticError):
    """A gradient held NaN or Inf on some rank.  Every rank raises this same error.

    Args:
        where: (layer name, rank) of each offending gradient of the step; rank None: it was seen
            in the sum over ranks only.
        of_hosts: whether these are the ranks that send for their hosts (hierarchical=True): then
            it was on any rank of that host.
        local_steps: whether it was in the weights at the end of a round of ``LocalSteps``.
    """

    def __init__(
        self,
        where: Iterable[tuple[str, int | None]],
        of_hosts: bool = False,
        local_steps: bool = False,
    ) -> None:
        self.where, self.of_hosts = sorted(set(where), key=str), of_hosts
        self.local_steps = local_steps
        on = "on the host of rank" if of_hosts else "on rank"
        places = ", ".join(
            f"layer {name!r} " + ("of some rank" if rank is None else f"{on} {rank}")
            for name, rank in self.where
        )
        what, advice = (
            "gradient",
            "nothing of it entered a residual. Lower the learning rate or clip gradients. With "
            "loss scaling, as torch.amp.GradScaler does it, pass nonfinite='skip' and loss_scale "
            "to DLSCompressor.",
        )
        if local_steps:
            what, advice = (
                "weights of LocalSteps",
                "all ranks are at the round's begin. Lower the optimizer's learning rate or clip "
                "gradients; nonfinite='skip' in DLSCompressor leaves such rounds out.",
            )
        super().__init__(f"{what} with NaN or Inf in {places}; {advice}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.where, self.of_hosts, self.local_steps)
