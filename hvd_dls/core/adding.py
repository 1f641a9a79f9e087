"""Adding up what all ranks sent of a bucket: all ranks and layers in one call."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hvd_dls.core.jit import HAVE_NUMBA
from hvd_dls.core.received import addresses

if HAVE_NUMBA:
    from hvd_dls.core import adding_loops as loops


def add_up(
    entries: Sequence[tuple[np.ndarray, np.ndarray]],
    starts: np.ndarray,
    offsets: np.ndarray,
    sums: np.ndarray,
) -> None:
    """Adds each rank's entries to sums, rank by rank: the same bits wherever it is done.

    Args:
        entries: of each rank, in rank order: indices (uint32, unique in a layer and within it:
            checked before) and values (of the sums' dtype); more than ``starts`` says, perhaps.
        starts: (P, L + 1) where each layer's entries begin.
        offsets: (L + 1,) where each layer's sums begin.
        sums: (n,) of all layers.
    """
    if HAVE_NUMBA:
        loops.add_up(addresses(entries), starts, offsets, sums)
    else:
        _add_up_numpy(entries, starts, offsets, sums)


def _add_up_numpy(
    entries: Sequence[tuple[np.ndarray, np.ndarray]],
    starts: np.ndarray,
    offsets: np.ndarray,
    sums: np.ndarray,
) -> None:
    with np.errstate(all="ignore"):  # what goes beyond the type is found by who uses it
        for (indices, values), own in zip(entries, starts, strict=True):
            where = np.repeat(offsets[:-1], np.diff(own)) + indices[: own[-1]]
            sums[where] += values[: own[-1]]
