"""Random numbers with light and heavy tails, as gradients have."""

from __future__ import annotations

import numpy as np

TAILS = ("normal", "laplace", "student")


def make_noise(tail: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """Draws (size,) float32 with zero mean.

    Args:
        tail: one of TAILS; "student" has 3 degrees of freedom.
        size: how many.
        rng: the source of randomness.

    Raises:
        ValueError: there is no such tail.
    """
    if tail == "normal":
        return rng.standard_normal(size, np.float32)
    if tail == "laplace":
        return rng.laplace(0, 1, size).astype(np.float32)
    if tail == "student":
        return rng.standard_t(3, size).astype(np.float32)
    raise ValueError(f"tail {tail!r}: accepted are {', '.join(TAILS)}")
