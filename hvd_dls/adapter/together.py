"""What all ranks do at once, outside a step: if one fails, all raise, and nobody waits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from hvd_dls.adapter.world import World
from hvd_dls.core.wire import agreement
from hvd_dls.errors import CheckpointError, DLSError

T = TypeVar("T")


class Together(ABC):
    """All ranks of the job.

    Args:
        world: of the global process set.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.rank, self.size = world.rank, world.size

    @abstractmethod
    def _gather(self, name: str, array: np.ndarray) -> np.ndarray:
        """All ranks' arrays (uint8), of any lengths, one after the other in rank order."""

    def gather(self, name: str, array: np.ndarray) -> np.ndarray:
        """The same; a single rank's own."""
        return array if self.size == 1 else self._gather(f"hvd_dls.checkpoint.{name}", array)

    def do(self, what: str, action: Callable[[], Any]) -> list[Any]:
        """Acts on each rank and waits for the others.

        Args:
            what: a name for it.
            action: returns something that JSON can hold.

        Returns:
            What it returned, of all ranks.

        Raises:
            CheckpointError: on every rank, if it raised on some; names the rank and its error.
        """
        value, error = None, None
        try:
            value = action()
        except Exception as met:
            error = met
        told = "" if error is None else _in_words(error)
        message = agreement.encode([told, value])
        everyone = agreement.decode(self.gather(what, message), self.size)
        if failed := [(rank, told) for rank, (told, _) in enumerate(everyone) if told]:
            words = [told for _, told in failed]
            if len(failed) == self.size and len(set(words)) == 1:  # of something all have
                text = words[0]
            else:
                text = "; ".join(f"rank {rank}: {told}" for rank, told in failed)
            # An error of ours keeps its kind if all ranks met it alike.
            kind = type(error) if isinstance(error, DLSError) and text == told else CheckpointError
            raise kind(text) from error
        return [value for _, value in everyone]

    def do_and_keep(self, what: str, action: Callable[[], T]) -> T:
        """The same, of an action whose result each rank keeps for itself."""
        kept: list[T] = []
        self.do(what, lambda: kept.append(action()))
        return kept[0]


def _in_words(error: Exception) -> str:
    ours = isinstance(error, DLSError) and str(error)
    return str(error) if ours else f"{type(error).__name__}: {error}"
