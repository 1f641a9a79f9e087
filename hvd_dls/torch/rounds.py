"""What ranks tell each other before each step while some may have no more data."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import horovod.torch as hvd
import numpy as np

from hvd_dls.torch.exchange import finish, start


class Intent(IntEnum):
    """What a rank is about to do."""

    WAIT = 0  # it has no more data, and takes part as long as others have
    STEP = 1
    LEAVE = 2  # an exception ended its loop: it takes part no more


class Habits(NamedTuple):
    """How Horovod reduces the parameters of an optimizer where that follows from data.

    Attributes:
        sparse: (n,) bool: the gradient is sparse.
        singly: (n,) bool: of a group, but by itself, as another one of it had no gradient.
    """

    sparse: np.ndarray
    singly: np.ndarray

    @classmethod
    def none(cls, n: int) -> Habits:
        """Of n parameters, nothing special."""
        return cls(np.zeros(n, bool), np.zeros(n, bool))

    @classmethod
    def of_all(cls, habits: Sequence[Habits]) -> Habits:
        """Of a parameter, what is so on any rank."""
        sparse, singly = (np.any(masks, axis=0) for masks in zip(*habits, strict=True))
        return cls(sparse, singly)

    def encode(self) -> np.ndarray:
        """uint8, of the same length on all ranks."""
        return np.packbits(np.concatenate(self))

    @classmethod
    def decode(cls, packed: np.ndarray, n: int) -> Habits:
        """The opposite of ``encode``, of n parameters."""
        bits = np.unpackbits(packed, count=2 * n).astype(bool)
        return cls(bits[:n], bits[n:])


class Word(NamedTuple):
    """What one rank tells.

    Attributes:
        intent: of the rank.
        options: CRC-32 of its optimizer's options.
        habits: as of its last step; None before one.
    """

    intent: Intent
    options: int
    habits: Habits | None

    def encode(self, n: int) -> np.ndarray:
        """uint8, of the same length on all ranks, for n parameters."""
        known = self.habits is not None
        head = [self.intent, known, *self.options.to_bytes(4, "little")]
        habits = self.habits or Habits.none(n)
        return np.concatenate([np.array(head, np.uint8), habits.encode()])

    @classmethod
    def decode(cls, row: np.ndarray, n: int) -> Word:
        """The opposite of ``encode``."""
        habits = Habits.decode(row[6:], n) if row[1] else None
        return cls(Intent(row[0]), int.from_bytes(row[2:6].tobytes(), "little"), habits)


class Rounds:
    """Rounds in which every rank tells one word; whoever tells need not wait for the others'.

    Args:
        name: of the operation.
        process_set: the ranks.
        n: number of parameters.
    """

    def __init__(self, name: str, process_set: hvd.ProcessSet, n: int) -> None:
        self._name, self._process_set, self._n = name, process_set, n
        self._handle: int | None = None
        self._words: list[Word] = []

    def tell(self, word: Word) -> None:
        """Begins a round; first waits for the end of the last one."""
        self.heard()
        self._handle = start(self._name, word.encode(self._n), self._process_set)

    def heard(self) -> list[Word]:
        """All ranks' words of the last round, in rank order; nothing before the first.

        Raises:
            HorovodInternalError: a rank failed or left.
        """
        if self._handle is not None:
            rows = finish(self._handle).reshape(self._process_set.size(), -1)
            self._words = [Word.decode(row, self._n) for row in rows]
            self._handle = None
        return self._words
