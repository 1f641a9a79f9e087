"""What a layer would send, and its description, in the forms the core's parts hand on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hvd_dls.core.passes import Found, find
from hvd_dls.core.sketch import Sketch


def take(values: np.ndarray, k: int) -> tuple[Found, np.ndarray]:
    """The k largest, and what stays: zero where something was taken."""
    found = find(np.zeros_like(values), values, k)
    assert found is not None
    rest = values.copy()
    rest[found.indices] = 0
    return found, rest


def stacked(rows: Sequence[Sequence[Sketch]]) -> tuple[np.ndarray, np.ndarray]:
    """Bases (L, P) and counts (L, P, WINDOW) of rows of all ranks' sketches."""
    bases = np.array([[sketch.base for sketch in row] for row in rows])
    return bases, np.array([[sketch.counts for sketch in row] for row in rows])
