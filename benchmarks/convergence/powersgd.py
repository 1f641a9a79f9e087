"""Workers that exchange gradients by PowerSGD, as torch's hook for DistributedDataParallel does.

arXiv:1905.13727 (Vogels, Karimireddy, Jaggi); the choices are those of torch's powerSGD_hook.py:
warm start, error feedback, averages of factors, and dense steps in the beginning.
"""

from __future__ import annotations

import numpy as np
from torch import nn

from benchmarks.convergence.simulation import Gradients, SimulatedJob, averages

_PAYS_FROM = 2  # a matrix is sent by its factors if they are less than its half


class PowerSGDJob(SimulatedJob):
    """A number of workers that train one model.

    Args:
        model: all of its parameters take part in each step.
        workers: how many there are, P.
        rank: of the approximation.
        dense_steps: at the beginning, in which gradients are averaged whole.

    Attributes:
        sent_bytes: that were handed to allreduce in the last step, by each worker.
    """

    def __init__(self, model: nn.Module, workers: int, rank: int, dense_steps: int) -> None:
        super().__init__(model, workers)
        self._rank, self._dense_steps = rank, dense_steps
        shapes = {n: (len(p), p.numel() // len(p)) for n, p in model.named_parameters()}
        self._shapes = {
            name: (rows, columns)
            for name, (rows, columns) in shapes.items()
            if (rows + columns) * min(rank, rows, columns) * _PAYS_FROM < rows * columns
        }
        generator = np.random.default_rng(0)
        self._right = {
            name: _orthogonal(generator.standard_normal((columns, min(rank, rows, columns))))
            for name, (rows, columns) in self._shapes.items()
        }
        self._errors = [
            {name: np.zeros(shape, np.float32) for name, shape in self._shapes.items()}
            for _ in range(workers)
        ]
        self.sent_bytes = 0

    def reduced(self, gradients: list[Gradients]) -> Gradients:
        """See ``SimulatedJob``."""
        if self._dense_steps > 0:
            self._dense_steps -= 1
            self.sent_bytes = sum(g.nbytes for g in gradients[0].values())
            return averages(gradients)
        whole = [{n: g for n, g in own.items() if n not in self._shapes} for own in gradients]
        reduced = averages(whole)
        self.sent_bytes = sum(g.nbytes for g in reduced.values())
        for name, shape in self._shapes.items():
            matrices = [
                own[name].reshape(shape) + errors[name]
                for own, errors in zip(gradients, self._errors, strict=True)
            ]
            left = _orthogonal(np.mean([m @ self._right[name] for m in matrices], 0))
            self._right[name] = np.mean([m.T @ left for m in matrices], 0)
            self.sent_bytes += 4 * (left.size + self._right[name].size)
            approximated = (left @ self._right[name].T).astype(np.float32)
            for matrix, errors in zip(matrices, self._errors, strict=True):
                errors[name] = matrix - approximated
            reduced[name] = approximated.reshape(-1)
        return reduced


def _orthogonal(matrix: np.ndarray) -> np.ndarray:
    """Makes columns orthonormal, (n, rank)."""
    q, _ = np.linalg.qr(matrix)
    return np.ascontiguousarray(q, np.float32)
