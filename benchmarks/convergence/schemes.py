"""Ways in which workers exchange sparse gradients, simulated: NumPy alone, no payloads.

Each takes what entered the workers' accumulators, and returns the sum that all of them apply.  A
worker's choice is the exact top-k of all its entries, which is what the layers' common threshold
of DLS comes to.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

SCHEMES = ("gathered", "returned", "kept", "oracle")


class Exchanged(NamedTuple):
    """What a step's exchange comes to.

    Attributes:
        total: (n,) float32, what all workers apply: a sum over workers.
        updated: entries of it that are not zero.
    """

    total: np.ndarray
    updated: int


class Scheme:
    """One way to exchange, and what its workers and owners remember.

    "gathered": each worker's top-k goes to all others.  The rest of them splits the entries among
    owners, one for each worker, who add up what they get and hand out the k largest sums:
    "returned", what is not handed out stays with the workers that sent it (Ok-Topk); "kept", it
    stays with the owner, who adds it to what comes next.  "oracle": the k largest sums of all that
    workers hold, which nobody knows a cheap way to find.

    Args:
        name: one of SCHEMES.
        workers: number of workers, P.
        entries: of the model, n.
        momentum: factor of the workers' velocities.
        masking: whether velocities of entries that leave a worker are cleared.
    """

    def __init__(
        self, name: str, workers: int, entries: int, momentum: float, masking: bool
    ) -> None:
        if name not in SCHEMES:
            raise ValueError(f"scheme {name!r}: accepted are {', '.join(SCHEMES)}")
        self.name = name
        self.residuals = np.zeros((workers, entries), np.float32)
        self.velocities = np.zeros((workers, entries), np.float32)
        self.owners = np.zeros(entries, np.float32)  # what owners have kept: each its own region
        self._momentum, self._masking = np.float32(momentum), masking
        self._bounds = [0.0] * workers  # where to begin to look for each worker's k largest

    def exchange(self, gradients: np.ndarray, k: int) -> Exchanged:
        """Exchanges a step's gradients.

        Args:
            gradients: (P, n) float32.
            k: entries that each worker sends, and that owners hand out.
        """
        self.velocities *= self._momentum
        self.velocities += gradients
        self.residuals += self.velocities
        if self.name == "oracle":
            sums = self.residuals.sum(axis=0)
            return self._hand_out(sums, _largest(sums, k), None)
        total = np.zeros_like(self.owners)
        sent = []
        for worker, residual in enumerate(self.residuals):
            chosen = _largest(residual, k, self._bounds[worker])
            self._bounds[worker] = 0.8 * float(np.abs(residual[chosen]).min())
            total[chosen] += residual[chosen]
            sent.append(chosen)
        if self.name == "gathered":
            return self._hand_out(total, None, sent)
        if self.name == "returned":
            return self._hand_out(total, _largest(total, k), sent)
        self.owners += total
        out = self._hand_out(self.owners, _largest(self.owners, k), sent, leave=True)
        self.owners[out.total != 0] = 0
        return out

    def _hand_out(
        self,
        sums: np.ndarray,
        survivors: np.ndarray | None,
        sent: list[np.ndarray] | None,
        leave: bool = False,
    ) -> Exchanged:
        """Applies some of the sums, and clears what has left the workers.

        Args:
            sums: (n,) float32.
            survivors: entries that are handed out; None: all.
            sent: of each worker; None: all entries.
            leave: whether also what is not handed out has left its worker.
        """
        out = np.zeros(len(sums), bool)
        out[slice(None) if survivors is None else survivors] = True
        for worker, residual in enumerate(self.residuals):
            gone = np.flatnonzero(out) if sent is None else sent[worker]
            if not leave:
                gone = gone[out[gone]]
            residual[gone] = 0
            if self._masking:
                self.velocities[worker][gone] = 0
        total = np.where(out, sums, np.float32(0))
        return Exchanged(total, int(np.count_nonzero(total)))


def _largest(values: np.ndarray, k: int, bound: float = 0.0) -> np.ndarray:
    """Finds the k entries with the largest magnitudes, ascending.

    Args:
        values: (n,).
        k: at most n.
        bound: a guess below the k-th magnitude; a wrong one costs time only.
    """
    magnitudes = np.abs(values)
    candidates = np.flatnonzero(magnitudes > bound)
    if len(candidates) < k:
        candidates = np.arange(len(values))
    if len(candidates) > k:
        part = np.argpartition(magnitudes[candidates], len(candidates) - k)[-k:]
        candidates = np.sort(candidates[part])
    return candidates


def entry_bytes(density: float) -> float:
    """Computes what an entry takes: a float32 and an index in Elias–Fano's code."""
    return 4 + (2 + math.log2(1 / density)) / 8


def received(name: str, workers: int, density: float) -> float:
    """Computes what a worker receives in a step, in bytes for each entry of the model.

    Args:
        name: one of SCHEMES; an oracle is counted as those with owners.
        workers: how many there are.
        density: share of the entries that each worker sends, and that owners hand out.
    """
    rounds = workers - 1 if name == "gathered" else 2 * (1 - 1 / workers)
    return rounds * density * entry_bytes(density)


def density_for(name: str, workers: int, limit: float) -> float:
    """Finds the density at which a worker receives so many bytes for each entry of the model."""
    low, high = 1e-7, 1.0
    for _ in range(60):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if received(name, workers, middle) > limit else (middle, high)
    return low
