"""What a framework provides for candidates to be tried."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from hvd_dls.advice.candidates import Candidate
from hvd_dls.core.session.stats import Stats
from hvd_dls.core.wire.agreement import Facts

OPERATIONS = ("allreduce float32", "allreduce float16", "allgather")


class Trial(ABC):
    """Steps of a model with one candidate."""

    @abstractmethod
    def step(self) -> None:
        """Makes one step: forward, backward with the exchange, the optimizer's update."""

    @abstractmethod
    def wait(self) -> None:
        """Waits until this rank's steps are done, on a device, too."""

    @abstractmethod
    def rest(self) -> None:
        """Gives gradients' memory back until the next turn."""

    @abstractmethod
    def stats(self, window: int) -> Stats | None:
        """The compressor's, see ``stats`` there; None if it is not DLS."""


class Subject(ABC):
    """A model whose steps are made with one candidate after the other."""

    @abstractmethod
    def facts(self) -> Facts:
        """What must be the same on all ranks: its parameters."""

    @abstractmethod
    def gradients(self) -> list[tuple[int, int]]:
        """Entries, and bytes of an entry, of each gradient."""

    @abstractmethod
    def trial(self, candidate: Candidate) -> Trial:
        """Begins trying a candidate; exchanges nothing yet."""


class Lab(ABC):
    """One of the ranks of a job, and what it needs of Horovod.

    Attributes:
        rank, size, local_size: this rank, the number of ranks, of those on this host.
        cross_size: number of hosts, of those that have a rank of this local number.
    """

    rank: int
    size: int
    local_size: int
    cross_size: int

    @abstractmethod
    def gather(self, name: str, array: np.ndarray) -> np.ndarray:
        """All ranks' arrays (uint8), of any lengths, one after the other in rank order."""

    @abstractmethod
    def operate(self, operation: str, length: int) -> None:
        """Makes an operation and waits for it.

        Args:
            operation: one of OPERATIONS.
            length: bytes that this rank hands over; a multiple of 4.
        """
