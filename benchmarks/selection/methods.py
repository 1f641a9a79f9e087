"""Methods to select the k largest entries of residual + gradient, ours and the usual ones.

Each is a generator function that yields when it has selected and again when the step is done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from benchmarks.common.internals import Found, find, settle, threads

FLOOR = "np.add"
OURS = ["hvd_dls", "hvd_dls, first step", "hvd_dls, one thread"]

# Of residual (n,), gradient (n,) and k; it changes both.
Method = Callable[[np.ndarray, np.ndarray, int], Iterator[None]]


def find_finite(*arguments: Any) -> Found:
    """Calls ``find`` for gradients without NaN and Inf."""
    found = find(*arguments)
    assert found is not None
    return found


def floor(residual: np.ndarray, gradient: np.ndarray, k: int) -> Iterator[None]:
    """Adds only, which is the least that any method does."""
    np.add(residual, gradient, out=residual)
    yield
    yield


def ours(last_threshold: float, count: int) -> Method:
    """Makes the method of this package.

    Args:
        last_threshold: of the step before; 0 if there was none.
        count: number of threads.
    """

    def method(residual: np.ndarray, gradient: np.ndarray, k: int) -> Iterator[None]:
        threads.use(count)
        found = find_finite(residual, gradient, k, last_threshold)
        yield
        sent = [(found.indices, found.values)]
        settle(residual, gradient, found.indices, None, sent, 1.0, gradient)
        yield

    return method


def argpartition(residual: np.ndarray, gradient: np.ndarray, k: int) -> Iterator[None]:
    """Selects by NumPy's ``argpartition``."""
    np.add(residual, gradient, out=residual)
    indices = np.argpartition(np.abs(residual), len(residual) - k)[len(residual) - k :]
    values = residual[indices]
    residual[indices] = 0
    yield
    gradient[:] = 0
    gradient[indices] += values
    yield


def in_torch(select: Callable[[torch.Tensor, int], torch.Tensor]) -> Method:
    """Makes a method of a function that selects by torch.

    Args:
        select: from (n,) magnitudes and k, the indices.
    """

    def method(residual: np.ndarray, gradient: np.ndarray, k: int) -> Iterator[None]:
        own, new = torch.from_numpy(residual), torch.from_numpy(gradient)
        own.add_(new)
        indices = select(own.abs(), k)
        values = own[indices]
        own[indices] = 0
        yield
        new.zero_()
        new.index_add_(0, indices, values)
        yield

    return method


def topk(magnitudes: torch.Tensor, k: int) -> torch.Tensor:
    """Selects by ``torch.topk``."""
    return torch.topk(magnitudes, k, sorted=False).indices


def kthvalue(magnitudes: torch.Tensor, k: int) -> torch.Tensor:
    """Selects what reaches the k-th value."""
    threshold = torch.kthvalue(magnitudes, len(magnitudes) - k + 1).values
    return (magnitudes >= threshold).nonzero().view(-1)


def dgc(magnitudes: torch.Tensor, k: int) -> torch.Tensor:
    """Selects by a threshold from a sample of 1 %, as Deep Gradient Compression does.

    (Lin et al. 2018.)
    """
    n = len(magnitudes)
    sampled = magnitudes[torch.randint(0, 100, ()) % n :: 100] if n >= 10_000 else magnitudes
    wanted = max(1, k * len(sampled) // n)
    threshold = torch.topk(sampled, wanted, sorted=False).values.min()
    indices = (magnitudes >= threshold).nonzero().view(-1)
    for _ in range(10):
        if len(indices) > 1.3 * k:
            threshold = threshold * 1.3
        elif len(indices) < 0.8 * k:
            threshold = threshold * 0.8
        else:
            break
        indices = (magnitudes >= threshold).nonzero().view(-1)
    return indices[:k]


def all_methods(last_threshold: float, count: int) -> dict[str, Method]:
    """Returns all methods by name.

    Args:
        last_threshold: of the step before.
        count: threads of ours.
    """
    return {
        FLOOR: floor,
        OURS[0]: ours(last_threshold, count),
        OURS[1]: ours(0.0, count),
        **({OURS[2]: ours(last_threshold, 1)} if count > 1 else {}),
        "DGC's sample": in_torch(dgc),
        "torch.topk": in_torch(topk),
        "torch.kthvalue": in_torch(kthvalue),
        "np.argpartition": argpartition,
    }
