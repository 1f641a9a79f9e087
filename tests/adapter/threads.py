"""Ranks that are threads of one process, and what they do together."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from hvd_dls.adapter.compressor import BaseCompressor
from hvd_dls.adapter.together import Together
from hvd_dls.adapter.world import World


class Meeting:
    """Where ranks meet to hand each other arrays."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._barrier = threading.Barrier(size)
        self._there: dict[int, tuple[str, np.ndarray]] = {}

    def gather(self, rank: int, name: str, array: np.ndarray) -> np.ndarray:
        """All ranks' arrays; all have to call it by the same name."""
        self._there[rank] = name, array
        self._barrier.wait(60)
        names, arrays = zip(*(self._there[r] for r in range(self.size)), strict=True)
        assert len(set(names)) == 1, names
        gathered = np.concatenate(arrays)
        self._barrier.wait(60)
        return gathered


class Ranks(Together):
    """One of the threads."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        super().__init__(World(rank, meeting.size, meeting.size, 0, rank, rank))
        self._meeting = meeting

    def _gather(self, name: str, array: np.ndarray) -> np.ndarray:
        return self._meeting.gather(self.rank, name, array)


def on_ranks(size: int, action: Callable[[Ranks], Any]) -> list[Any]:
    """What an action returns or raises on each rank."""
    meeting = Meeting(size)

    def attempt(rank: int) -> Any:
        try:
            return action(Ranks(meeting, rank))
        except Exception as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(attempt, range(size)))


class Model:
    """Stands where an adapter's binding does: a session in one process."""

    alive = True

    def __init__(self, session: Any) -> None:
        self.session = session

    def state_dict(self) -> dict[str, Any]:
        return self.session.state_dict()


def compressor_of(session: Any) -> BaseCompressor:
    """A compressor that has trained a model."""
    compressor = BaseCompressor()
    compressor.config = session.config
    compressor._bindings = [Model(session)]
    return compressor
