"""How many entries of each layer lie above a threshold: exactly, or from sketches.

Both forms answer the same questions, so that one balancing algorithm (balance.py) runs on either.
Counts are those of one rank, or the mean over ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from hvd_dls.core.balancing.sketch import edges


class Curves(Protocol):
    """What balancing needs to know of L layers."""

    sizes: np.ndarray

    def smallest_sent(self, k: np.ndarray) -> np.ndarray:
        """(L,) the k_l-th largest magnitude of each layer: its threshold."""

    def largest_unsent(self, k: np.ndarray) -> np.ndarray:
        """(L,) the (k_l + 1)-th largest magnitude of each layer; -inf if there is none."""

    def above(self, layer: int, threshold: float) -> float:
        """How many magnitudes of a layer are > threshold."""

    def at_least(self, layer: int, threshold: float) -> float:
        """How many magnitudes of a layer are >= threshold."""


class ExactCurves:
    """From the magnitudes themselves, sorted: the oracle, and Algorithm 2 as in the paper.

    Args:
        layers: L arrays of values or magnitudes, any shape, not empty.
    """

    def __init__(self, layers: Sequence[np.ndarray]) -> None:
        self._ascending = [np.sort(np.abs(np.ravel(layer))) for layer in layers]
        self.sizes = np.array([len(values) for values in self._ascending], dtype=np.int64)

    def smallest_sent(self, k: np.ndarray) -> np.ndarray:
        return np.array(
            [a[len(a) - n] if n else np.inf for a, n in zip(self._ascending, k, strict=True)]
        )

    def largest_unsent(self, k: np.ndarray) -> np.ndarray:
        return np.array(
            [
                a[len(a) - n - 1] if n < len(a) else -np.inf
                for a, n in zip(self._ascending, k, strict=True)
            ]
        )

    def above(self, layer: int, threshold: float) -> float:
        values = self._ascending[layer]
        return len(values) - int(np.searchsorted(values, threshold, side="right"))

    def at_least(self, layer: int, threshold: float) -> float:
        values = self._ascending[layer]
        return len(values) - int(np.searchsorted(values, threshold, side="left"))


class SketchedCurves:
    """From all ranks' sketches: piecewise linear between bin edges, averaged over the ranks.

    A curve is known where every rank's window has begun; below that it stays constant, so one
    adjustment moves a threshold down by at most the window's lower part.

    Args:
        bases: (L, P) first bin of each layer's sketch on each of P ranks.
        counts: (L, P, W) counts of these sketches, of W bins each.
        sizes: (L,) entries of each layer.
    """

    def __init__(self, bases: np.ndarray, counts: np.ndarray, sizes: np.ndarray) -> None:
        self.sizes = np.asarray(sizes, dtype=np.int64)
        bases = np.asarray(bases, dtype=np.int64)
        counts = np.asarray(counts, dtype=np.float64)
        n_layers, world_size = bases.shape
        window = counts.shape[-1]
        first, last = int(bases.min()), int(bases.max()) + window
        span = last - first
        rows = np.arange(n_layers)[:, None, None] * span
        cells = rows + (bases[:, :, None] - first) + np.arange(window)
        # Whole numbers below 2**53 add exactly in float64, whatever the order.
        total = np.bincount(cells.ravel(), counts.ravel(), minlength=n_layers * span)
        total = total.reshape(n_layers, span)
        known_from = bases.max(axis=1) - first
        total[np.arange(span) < known_from[:, None]] = 0
        self.edges = edges(first, last)
        self.counts = np.zeros((n_layers, span + 1))  # entries >= each edge
        self.counts[:, :-1] = np.cumsum(total[:, ::-1], axis=1)[:, ::-1] / world_size
        self._known_from = known_from

    def smallest_sent(self, k: np.ndarray) -> np.ndarray:
        # The last edge with at least k entries above it, no lower than where the curve is known.
        edge = np.count_nonzero(self.counts >= np.asarray(k)[:, None], axis=1) - 1
        edge = np.maximum(edge, self._known_from)
        rows = np.arange(len(self.sizes))
        low, high = self.edges[edge], self.edges[edge + 1]
        beyond, within = self.counts[rows, edge + 1], self.counts[rows, edge]
        share = (k - beyond) / np.where(within > beyond, within - beyond, 1)
        thresholds: np.ndarray = high - np.clip(share, 0, 1) * (high - low)
        return thresholds

    def largest_unsent(self, k: np.ndarray) -> np.ndarray:
        wanted = np.asarray(k) + 1
        known = (wanted <= self.sizes) & (wanted <= self.counts[:, 0])
        return np.where(known, self.smallest_sent(wanted), -np.inf)

    def above(self, layer: int, threshold: float) -> float:
        return float(np.interp(threshold, self.edges, self.counts[layer]))

    at_least = above

    def at_common_threshold(self, total: int, least: np.ndarray) -> np.ndarray:
        """(L,) entries of each layer above one threshold, chosen so that they are ``total``.

        A layer with fewer than ``least`` (L,) above it counts with these.  All curves have their
        corners at the same edges, so their sum is piecewise linear too (but for the one bin in
        which a layer reaches its least) and the threshold is found by one look-up.
        """
        counts = np.clip(self.counts, least[:, None], self.sizes[:, None])
        together = counts.sum(axis=0)
        edge = int(np.count_nonzero(together >= total)) - 1
        if edge < 0:
            everything: np.ndarray = counts[:, 0]
            return everything
        edge = min(edge, len(together) - 2)
        within, beyond = together[edge], together[edge + 1]
        share = (total - beyond) / (within - beyond) if within > beyond else 0.0
        at: np.ndarray = counts[:, edge + 1] + share * (counts[:, edge] - counts[:, edge + 1])
        return at
