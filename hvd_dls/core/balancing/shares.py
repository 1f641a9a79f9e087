"""Which part of a bucket each owner has, and how many sums it hands out: two questions, one curve.

Owners hand out what lies above one threshold, which all regions share: a region is to its bucket
what a layer is to the model, so the same solver finds it.  As the budgets of buckets, shares follow
the mean of the last steps, and move only once that is off by more than a fifth: payloads keep their
lengths, and Horovod need not negotiate anew.  Where one owner has too much, regions move.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hvd_dls.core.balancing.curves import SketchedCurves
from hvd_dls.core.balancing.ratios import apportion

_WEIGHT = 0.1  # of the latest step in the mean
_TOLERANCE = 1 / 5  # of a share, that the mean may be off
_SLACK = 1.15  # entries that ranks may send to an owner, for each one that it hands out
_MORE = 4  # and so many more
_UNEVEN = 1.25  # times the mean share: more than that moves the regions
_REST = 16  # steps between two moves
_BETTER = 0.8  # times the largest share: only if it becomes less than that
_BY_SIZE = 0.1  # of a region's weight is its size, so that none is too large


class Shares:
    """The owners' regions and shares; all of it follows from what all ranks know.

    Args:
        bounds: of each of B buckets, (P + 1,) where regions begin, and the bucket's size.
    """

    def __init__(self, bounds: Sequence[np.ndarray]) -> None:
        self._first = [np.array(each, np.int64) for each in bounds]
        self.restart()

    def restart(self) -> None:
        """Begins anew: in proportion to the regions' sizes."""
        self.bounds = [each.copy() for each in self._first]
        self._means = [np.diff(each) / each[-1] for each in self.bounds]
        self._shares = [np.zeros(len(each) - 1, np.int64) for each in self.bounds]
        self._steps = np.zeros(len(self.bounds), np.int64)  # since the regions moved
        self._forget()

    def _forget(self) -> None:
        """What a step in progress uses is no part of the state until the step has ended."""
        self._now = [np.zeros_like(each) for each in self._shares]

    def of(self, bucket: int, total: int) -> np.ndarray:
        """(P,) int64 sums that each owner hands out of a bucket, ``total`` together.

        With fewer entries than owners each owner still has room for one.
        """
        sizes = np.diff(self.bounds[bucket])
        total = max(total, len(sizes))
        if self._shares[bucket].sum() == total:
            self._now[bucket] = self._shares[bucket]
        elif self._now[bucket].sum() != total:
            least = np.ones_like(sizes)
            self._now[bucket] = apportion(self._means[bucket] * total, total, least, sizes)
        return self._now[bucket]

    def room(self, bucket: int, total: int) -> np.ndarray:
        """(P,) int64 entries that a rank may send to each owner."""
        room = np.ceil(self.of(bucket, total) * _SLACK).astype(np.int64) + _MORE
        return np.minimum(room, np.diff(self.bounds[bucket]))

    def advance(self, bucket: int, bases: np.ndarray, counts: np.ndarray) -> None:
        """Ends a step.

        Args:
            bucket: its number.
            bases: (P,) first bin of each region's sketch of its sums.
            counts: (P, WINDOW) counts of these.
        """
        shares, sizes = self._now[bucket], np.diff(self.bounds[bucket])
        self._shares[bucket] = shares
        total, owners = int(shares.sum()), len(sizes)
        curves = SketchedCurves(bases[:, None], counts[:, None, :], sizes)
        now = curves.at_common_threshold(total, np.ones_like(sizes))
        now = now / _sums(now)[-1]
        self._steps[bucket] += 1
        mean, steps = self._means[bucket], int(self._steps[bucket])
        mean += max(_WEIGHT, 1 / steps) * (now - mean)
        if steps >= _REST and shares.max() > _UNEVEN * total / owners + _MORE:
            self._move(bucket)
        shares, mean = self._shares[bucket], self._means[bucket]
        if np.any(np.abs(mean * total - shares) > np.maximum(_TOLERANCE * shares, 1)):
            self._shares[bucket] = np.zeros_like(sizes)  # anew, when they are asked for
            self._now[bucket] = self._shares[bucket]

    def _move(self, bucket: int) -> None:
        """New regions, of about the same weight; within an old one, sums are taken to be even."""
        before, mean = self.bounds[bucket], self._means[bucket]
        weights = _BY_SIZE * np.diff(before) / before[-1] + (1 - _BY_SIZE) * mean
        bounds = even_bounds(before, weights, len(mean))
        reached = np.concatenate([[0.0], _sums(mean)])
        means = np.diff(np.interp(bounds, before, reached))
        if means.max() < _BETTER * mean.max():
            self._means[bucket], self.bounds[bucket] = means, bounds
            self._shares[bucket] = self._now[bucket] = np.zeros_like(self._shares[bucket])
            self._steps[bucket] = 0

    def state(self) -> np.ndarray:
        """All of it in whole numbers: int64."""
        means = [mean.view(np.int64) for mean in self._means]
        return np.concatenate([self._steps, *self.bounds, *self._shares, *means])

    def restore(self, state: np.ndarray) -> None:
        """Goes on from a ``state()``; of other buckets or ranks, it begins anew."""
        owners, buckets = [len(each) - 1 for each in self._first], len(self._first)
        lengths = [buckets, *(n + 1 for n in owners), *owners, *owners]
        self.restart()
        if len(state) != sum(lengths):
            return
        steps, *rest = np.split(np.array(state, np.int64), np.cumsum(lengths)[:-1])
        bounds = rest[:buckets]
        if any(
            own[0] != 0 or own[-1] != first[-1] or (np.diff(own) < 1).any()
            for own, first in zip(bounds, self._first, strict=True)
        ):
            return
        self._steps, self.bounds, self._shares = steps, bounds, rest[buckets : 2 * buckets]
        self._means = [part.copy().view(np.float64) for part in rest[2 * buckets :]]
        self._forget()


def even_bounds(edges: np.ndarray, weights: np.ndarray, owners: int) -> np.ndarray:
    """Where regions of the same weight begin; none is empty.

    Args:
        edges: (n + 1,) ascending whole numbers, from 0.
        weights: (n,) of what lies between two edges, spread evenly there.
        owners: number of regions, at most the last edge.

    Returns:
        (owners + 1,) int64.
    """
    reached = np.concatenate([[0.0], _sums(weights)])
    inner = np.interp(reached[-1] * np.arange(1, owners) / owners, reached, edges)
    bounds = np.concatenate([[0], np.rint(inner).astype(np.int64), [edges[-1]]])
    for owner in range(1, owners):
        bounds[owner] = max(bounds[owner], bounds[owner - 1] + 1)
    most: np.ndarray = np.minimum(bounds, edges[-1] - owners + np.arange(owners + 1))
    return most


def _sums(values: np.ndarray) -> np.ndarray:
    """Strictly from first to last: np.sum's order may differ between processors."""
    return np.cumsum(values)
