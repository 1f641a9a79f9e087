"""Before the first exchange: do all ranks compress the same model in the same way?"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from hvd_dls.config import DLSConfig
from hvd_dls.core.balancing.layers import LayerSpec
from hvd_dls.core.wire.payload import VERSION
from hvd_dls.errors import DLSError

_PARTS = ("options or another version of hvd_dls", "parameters (names, shapes or types)")
_PART_BYTES = 16


def digest(config: DLSConfig, layers: Sequence[LayerSpec]) -> np.ndarray:
    """(32,) uint8: one fingerprint of the options and one of the parameters."""
    parts = repr((VERSION, config)), repr(tuple(layers))
    raw = b"".join(hashlib.sha256(part.encode()).digest()[:_PART_BYTES] for part in parts)
    return np.frombuffer(raw, np.uint8).copy()


def check_agreement(digests: np.ndarray, world_size: int) -> None:
    """Compares the digests of all ranks.

    Args:
        digests: (world_size * 32,) uint8, in rank order.
        world_size: number of ranks.

    Raises:
        DLSError: on every rank alike, naming the ranks that differ from rank 0 and in what.
    """
    rows = digests.reshape(world_size, len(_PARTS), _PART_BYTES)
    for part, what in enumerate(_PARTS):
        odd = np.flatnonzero((rows[:, part] != rows[0, part]).any(axis=1)).tolist()
        if odd:
            raise DLSError(f"rank(s) {odd} have other {what} than rank 0; all must have the same")
