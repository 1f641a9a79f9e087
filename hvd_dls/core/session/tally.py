"""What happened in all steps so far, added up; and so in any of the last ones, by subtraction."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import astuple

import numpy as np

from hvd_dls.core.balancing.plan import Plan
from hvd_dls.core.session.groups import Groups
from hvd_dls.core.session.stats import Period, Stats
from hvd_dls.core.session.stopwatch import Seconds
from hvd_dls.core.session.telemetry import StepRecord
from hvd_dls.errors import DLSError

KEPT = 1000  # steps that can be looked back: 8 bytes for each of a layer

# What is added up, besides a layer's entries, in this order.
_COUNTS = ("steps", "skipped", "entries", "payloads", "repeated")
_BYTES = ("sparse_bytes", "dense_bytes", "host_bytes", "whole_bytes")
_SCALARS = len(_COUNTS) + len(_BYTES) + len(astuple(Seconds()))


class Tally:
    """Adds up the records of one model's steps.

    Args:
        plan: its layers.
        groups: the ranks.
        bucket_bytes: of gradients that travel together, at most.
    """

    def __init__(self, plan: Plan, groups: Groups, bucket_bytes: int) -> None:
        self._groups, self._bucket_bytes = groups, bucket_bytes
        self._names = tuple(layer.name for layer in plan.sparse)
        self._sizes = plan.sizes
        self._whole_bytes = sum(layer.size * layer.itemsize for layer in plan.layers)
        # Sums over all steps up to one: of scalars, then of each layer's entries.  And its time.
        self._sums = np.zeros(_SCALARS + len(self._names))
        self._time = time.time()
        self._began = self._time
        self._before: deque[tuple[np.ndarray, float]] = deque(maxlen=KEPT)

    def add(self, record: StepRecord, skipped: int) -> None:
        """Takes a step in.

        Args:
            record: of the step.
            skipped: how many have been skipped before it.
        """
        entries, alone = int(record.k.sum()), self._groups.world_size == 1
        row = [
            *(1, skipped - self._sums[1], entries, record.payloads, record.repeated),
            *(record.sparse_bytes, 0 if alone else record.dense_bytes, record.host_bytes),
            0 if alone else self._whole_bytes,
            *vars(record.seconds).values(),
        ]
        self._before.append((self._sums, self._time))
        self._sums = self._sums + np.concatenate((row, record.k))
        self._time = record.time

    def inherit(self, other: Tally) -> None:
        """Goes on from the sums of the same model's steps among other ranks.

        If other layers are compressed there, it begins anew.
        """
        if self._names == other._names:
            self._sums, self._time, self._began = other._sums, other._time, other._began
            self._before = other._before.copy()

    @property
    def steps(self) -> int:
        """That were added up."""
        return int(self._sums[0])

    @property
    def sums(self) -> tuple[np.ndarray, float]:
        """All that was added up so far, and when: for ``since``.  It does not change any more."""
        return self._sums, self._time

    @property
    def sums_before(self) -> tuple[np.ndarray, float]:
        """The same before the last step."""
        return self._before[-1]

    def since(self, then: tuple[np.ndarray, float]) -> Period:
        """What happened since ``sums`` were taken."""
        return period_between(self._groups, self._sizes, then, self.sums)

    def stats(self, last: StepRecord, skipped: int, window: int) -> Stats:
        """The statistics of the last step, of the last ones, and of all.

        Args:
            last: record of the last step.
            skipped: steps that have been skipped so far.
            window: number of last steps, at most KEPT.

        Raises:
            DLSError: that is not what window is.
        """
        if isinstance(window, bool) or not isinstance(window, int) or not 1 <= window <= KEPT:
            raise DLSError(f"window={window!r}: accepted are whole numbers of steps, 1 to {KEPT}")
        return Stats(
            rank=self._groups.rank,
            world_size=self._groups.world_size,
            step=last.step,
            layers=self._names,
            sizes=self._sizes,
            bucket_bytes=self._bucket_bytes,
            thresholds=last.thresholds,
            spread=last.threshold_spread(),
            loss_scale=last.loss_scale,
            skipped=skipped,
            last=self.since(self.sums_before),
            window=self.since(self._before[-min(window, len(self._before))]),
            all=self.since((np.zeros_like(self._sums), self._began)),
        )


def period_between(
    groups: Groups,
    sizes: np.ndarray,
    then: tuple[np.ndarray, float],
    now: tuple[np.ndarray, float],
) -> Period:
    """The steps between two sums."""
    sums = now[0] - then[0]
    scalars, entries = sums[:_SCALARS].tolist(), sums[_SCALARS:]
    numbers = len(_COUNTS) + len(_BYTES)
    counts = dict(zip(_COUNTS + _BYTES, map(round, scalars[:numbers]), strict=True))
    ranks, senders = groups.world_size, groups.count
    ring = 2 * (ranks - 1) / ranks
    sparse, dense, whole = (counts[f"{name}_bytes"] for name in ("sparse", "dense", "whole"))
    return Period(
        **counts,
        link_bytes=round((senders - 1) * sparse + ring * dense),
        whole_link_bytes=round(ring * whole),
        densities=entries / np.maximum(counts["steps"] * sizes, 1),
        density=float(entries.sum() / max(counts["steps"] * int(sizes.sum()), 1)),
        seconds=Seconds(*(max(0.0, value) for value in scalars[numbers:])),
        elapsed=now[1] - then[1],
    )
