"""Adam in front of the selection: each worker divides its own momentum, and keeps updates.

With Adam behind the compressor, the second moment is quadratic in what arrives, and an entry that
waited for T steps arrives as one lump T times as large: its step shrinks.  In front of it, what
waits is a sum of updates, and a plain sum reaches the weights, late but whole.  Left is the
question which second moment a worker should divide by: that of the averaged gradient, which dense
training has, is not known to it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from benchmarks.convergence.simulation import Gradients, averages

EPSILON = 1e-8


class Moments(NamedTuple):
    """How updates are made.

    Attributes:
        second: the second moment that a worker divides by:

            - "own": of its own gradients.  It holds the noise of a small batch, so that updates are
              smaller than dense training's by up to the root of the number of workers, P.
            - "scaled": that of the averaged gradient, as far as it follows from the worker's own:
              mean² + variance / P, with mean and variance of its own gradients.
            - "oracle": that of the averaged gradient, which no worker knows: to compare with.
            - "shared": that of the averaged gradient at the last refresh, when own ones are
              exchanged densely (they are divided by P): in steps 1, 2, 4, 8, ... and every
              ``refresh`` steps, about as 0/1 Adam does (arXiv:2202.06009).
            - "frozen": that of the averaged gradient at the end of the warm-up, which is dense
              (1-bit Adam, arXiv:2102.02888).
        first: β₁.
        decay: β₂.
        nesterov: whether the newest gradient counts once more, as in NAdam.
        refresh: steps between two refreshes, for "shared".
    """

    second: str = "scaled"
    first: float = 0.9
    decay: float = 0.999
    nesterov: bool = False
    refresh: int = 100


class Preconditioner:
    """All workers' moments.

    Args:
        how: updates are made.
        workers: how many there are, P.
        frozen_at: step after which the second moment stays as it is, for "frozen".
    """

    def __init__(self, how: Moments, workers: int, frozen_at: int = 0) -> None:
        self._how = how
        self._workers = workers
        self._frozen_at = frozen_at
        self._first: list[Gradients] = [{} for _ in range(workers)]
        self._second: list[Gradients] = [{} for _ in range(workers)]
        self._means: list[Gradients] = [{} for _ in range(workers)]  # of squares of first moments
        self._of_average: Gradients = {}
        self._shared: Gradients = {}
        self._steps = 0

    def updates(self, gradients: list[Gradients]) -> list[Gradients]:
        """Computes what each worker accumulates in the place of its gradients.

        Args:
            gradients: of each worker.

        Returns:
            Of each worker, (n,) of each layer, without the learning rate.
        """
        self._steps += 1
        how, steps = self._how, self._steps
        if how.second in ("oracle", "frozen") and (how.second == "oracle" or not self._is_frozen):
            for name, mean in averages(gradients).items():
                _average(self._of_average, name, mean * mean, how.decay)
        for worker, own in enumerate(gradients):
            for name, gradient in own.items():
                _average(self._first[worker], name, gradient, how.first)
                _average(self._second[worker], name, gradient * gradient, how.decay)
                if how.second == "scaled":
                    first = self._first[worker][name]
                    _average(self._means[worker], name, first * first, how.decay)
        if how.second == "shared" and (steps % how.refresh == 0 or steps & (steps - 1) == 0):
            correction = 1 - how.decay**steps
            self._shared = {
                name: np.mean([own[name] for own in self._second], axis=0)
                / np.float32(correction * self._workers)
                for name in self._second[0]
            }
        return [
            {name: self._update(worker, name, gradient) for name, gradient in own.items()}
            for worker, own in enumerate(gradients)
        ]

    @property
    def _is_frozen(self) -> bool:
        return self._steps > max(1, self._frozen_at)

    def _update(self, worker: int, name: str, gradient: np.ndarray) -> np.ndarray:
        how = self._how
        first = self._first[worker][name]
        if how.nesterov:
            first = how.first * first + (1 - how.first) * gradient
        root = np.sqrt(self._divisor(worker, name)) + np.float32(EPSILON)
        result: np.ndarray = first / (np.float32(1 - how.first**self._steps) * root)
        return result.astype(np.float32)

    def _divisor(self, worker: int, name: str) -> np.ndarray:
        how, own = self._how, self._second[worker][name]
        correction = np.float32(1 - how.decay**self._steps)
        if how.second == "shared":
            return self._shared[name]
        if how.second == "frozen":
            steps = min(self._steps, max(1, self._frozen_at))
            return self._of_average[name] / np.float32(1 - how.decay**steps)
        if how.second == "oracle":
            return self._of_average[name] / correction
        if how.second == "own":
            return own / correction
        # The first moment is a mean of few gradients: some of their variance is in its square.
        noise = np.float32((1 - how.first) / (1 + how.first))
        mean = np.maximum((self._means[worker][name] - noise * own) / (1 - noise), 0)
        share = np.float32(1 / self._workers)
        result: np.ndarray = (share * own + (1 - share) * np.minimum(mean, own)) / correction
        return result


def _average(kept: Gradients, name: str, new: np.ndarray, decay: float) -> None:
    """Has an exponential average follow, in place."""
    if name not in kept:
        kept[name] = np.zeros_like(new)
    kept[name] *= np.float32(decay)
    kept[name] += np.float32(1 - decay) * new
