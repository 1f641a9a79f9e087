"""Who is to be told of the steps of Horovod's optimizers: see ``join``."""

from __future__ import annotations

from typing import Any, Protocol

import torch


class Watcher(Protocol):
    """Is told what happens in a step."""

    def step_begins(self, optimizer: Any) -> None:
        """A step's first gradient has come in."""

    def handed_over(self, optimizer: Any, parameter: torch.Tensor | None) -> None:
        """Horovod hands a gradient over: a parameter's, or of a group (None)."""

    def before_update(self, optimizer: Any) -> None:
        """All gradients are reduced, and the weights are about to change."""


current: Watcher | None = None
