"""What all ranks sent of a layer, for loops that take any number of ranks in one call."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class Received(Sequence[tuple[np.ndarray, np.ndarray]]):
    """Each rank's entries of a layer, in rank order: indices (uint32, ascending) and values.

    Args:
        ranks: arrays of all ranks; of which this layer's entries are a part.
        bounds: (P, 2) where that part begins and ends.
        table: (P, 3) int64, the same as addresses: where each rank's indices begin in memory, where
            its values do, and how many there are.
    """

    def __init__(
        self,
        ranks: Sequence[tuple[np.ndarray, np.ndarray]],
        bounds: np.ndarray,
        table: np.ndarray,
    ) -> None:
        self.ranks, self.bounds, self.table = ranks, bounds, table

    def __len__(self) -> int:
        return len(self.ranks)

    def __getitem__(self, rank):  # type: ignore[no-untyped-def]
        indices, values = self.ranks[rank]
        start, stop = self.bounds[rank].tolist()
        return indices[start:stop], values[start:stop]


def addresses(ranks: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """(P, 2) int64: where each rank's indices and values begin in memory."""
    where = [[array.__array_interface__["data"][0] for array in pair] for pair in ranks]
    return np.array(where, np.int64).reshape(-1, 2)


def table_of(ranks: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """The table of arrays (see ``Received``), which must live as long as it is used."""
    if isinstance(ranks, Received):
        return ranks.table
    counts = np.array([len(indices) for indices, _ in ranks], np.int64)
    return np.column_stack([addresses(ranks), counts])
