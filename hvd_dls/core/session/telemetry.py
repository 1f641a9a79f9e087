"""What happened in a step, as records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from hvd_dls.core.session.stopwatch import Seconds


@dataclass(frozen=True)
class Quality:
    """A step's choice beside exact global top-k of the same accumulators (one rank's).

    Attributes:
        energy: sum of squares sent over that of global top-k; 1 is ideal.
        misallocation: sum |k_l - k*_l| / 2K: the share of the budget in wrong layers; 0 is ideal.
        best_k: (L,) k*_l, entries of each layer in global top-k.
    """

    energy: float
    misallocation: float
    best_k: np.ndarray = field(compare=False)


@dataclass(frozen=True)
class StepRecord:
    """One step of one model, as this rank saw it.

    Attributes:
        step: number of the step, from 1.
        time: when it ended, in seconds since the epoch.
        names: of the L compressed layers.
        sizes: (L,) entries.
        k: (L,) entries sent.
        thresholds: (L,) smallest magnitude this rank sent.
        sparse_bytes: payload bytes this rank handed to allgather: what each of the others gets of
            it.  With owners, that and what each of them gets on average.
        dense_bytes: gradient bytes this rank handed to allreduce.
        quality: beside exact global top-k, in steps that measured it (``measure_every``).
        host_bytes: that this rank handed to Horovod for its own host (``hierarchical``).
        payloads: that this rank handed to allgather.
        repeated: those of them that were as long as in the step before.  Only for these can
            Horovod's response cache save a negotiation; whether it did, Horovod 0.28.1 tells
            nobody.
        loss_scale: what the loss was multiplied by, and with it the thresholds.
        seconds: where the time of the step went.
    """

    step: int
    time: float
    names: tuple[str, ...]
    sizes: np.ndarray
    k: np.ndarray
    thresholds: np.ndarray
    sparse_bytes: int
    dense_bytes: int
    quality: Quality | None = None
    host_bytes: int = 0
    payloads: int = 0
    repeated: int = 0
    loss_scale: float = 1.0
    seconds: Seconds = field(default_factory=Seconds, compare=False)

    def threshold_spread(self, least_k: int = 10) -> float:
        """Largest over smallest threshold among layers with k >= least_k; 1 is ideal.

        NaN if there are fewer than two such layers; inf if a threshold is zero.
        """
        counted = self.thresholds[self.k >= least_k]
        if len(counted) < 2:
            return float("nan")
        return float(counted.max() / counted.min()) if counted.min() > 0 else float("inf")


def measure_quality(sent: Sequence[np.ndarray], unsent: Sequence[np.ndarray]) -> Quality:
    """Compares what was sent with exact global top-k.

    Args:
        sent: L arrays (k_l,) of the values sent.
        unsent: L arrays (n_l,): the residuals left behind, zero where an entry was sent.

    Returns:
        Energy and misallocation; ties at the global threshold count in the choice's favour.
    """
    k = np.array([len(values) for values in sent], np.int64)
    total = int(k.sum())
    if not total:
        return Quality(1.0, 0.0, k)
    sent_magnitudes = np.abs(np.concatenate(sent))
    everything = np.concatenate([sent_magnitudes, *map(np.abs, unsent)])  # and zeros where sent
    best = np.partition(everything, len(everything) - total)[len(everything) - total :]
    best_k, best_energy = _best_k(best.min(), sent, unsent, total), _energy(best)
    return Quality(
        energy=_energy(sent_magnitudes) / best_energy if best_energy else 1.0,
        misallocation=float(np.abs(k - best_k).sum()) / (2 * total),
        best_k=best_k,
    )


def _best_k(
    threshold: float, sent: Sequence[np.ndarray], unsent: Sequence[np.ndarray], total: int
) -> np.ndarray:
    """(L,) entries of each layer above a threshold; of ties at it, those first that were sent."""

    def count(arrays: Sequence[np.ndarray], ties: bool) -> np.ndarray:
        compare = np.equal if ties else np.greater
        return np.array([np.count_nonzero(compare(np.abs(x), threshold)) for x in arrays])

    best = count(sent, ties=False) + count(unsent, ties=False)
    for arrays in (sent, unsent):
        before = np.cumsum(best_ties := count(arrays, ties=True)) - best_ties
        best = best + np.clip(total - best.sum() - before, 0, best_ties)
    return np.asarray(best)


def _energy(values: np.ndarray) -> float:
    return float(np.sum(np.square(values, dtype=np.float64)))
