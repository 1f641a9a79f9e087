"""How long it takes to add up what all ranks sent of a layer, and to book it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.clock import Clock, Times, summary
from benchmarks.gpu.methods import FLOOR, Layer, floor
from benchmarks.gpu.noise import Noise
from benchmarks.gpu.passes import Make, Ways
from hvd_dls.core.received import Received, table_of

SIZES = [1_000_000, 25_000_000]
DENSITIES = [1e-3, 1e-2]
RANKS = [2, 4, 16, 64]
REPEATS, QUICK_REPEATS = 10, 3

Sent = list[tuple[np.ndarray, np.ndarray]]  # of each rank: (k,) uint32 ascending, (k,) float32


def sent_by_all(size: int, k: int, ranks: int, rng: np.random.Generator) -> Sent:
    """Draws indices, uniform and independent, so that ranks hardly overlap, and values."""
    sent = []
    for _ in range(ranks):
        drawn = np.unique(rng.integers(size, size=k + k // 8 + 8, dtype=np.uint32))
        while len(drawn) < k:
            drawn = np.unique(np.append(drawn, rng.integers(size, size=k, dtype=np.uint32)))
        unwanted = rng.choice(len(drawn), len(drawn) - k, replace=False, shuffle=False)
        sent.append((np.delete(drawn, unwanted), rng.standard_normal(k, np.float32)))
    return sent


def rows_of(
    device: torch.device, ways: Ways, quick: bool, keep: Callable[[dict[str, Any]], None]
) -> None:
    """Measures all sizes, densities and numbers of ranks.

    Args:
        device: where.
        ways: in which this package settles.
        quick: a million entries only, and few repetitions.
        keep: is given each row of figures.
    """
    clock = Clock(device, QUICK_REPEATS if quick else REPEATS)
    for size in SIZES:
        if quick and size > 1_000_000:
            continue
        residual, gradient = Noise(size, device, count=2).gradients
        add = floor(Layer(residual, [gradient], torch.empty_like(gradient), 0))
        add_ms = summary(clock.measure(add.launch))
        for density in DENSITIES:
            k = round(density * size)
            sent = sent_by_all(size, k, max(RANKS), np.random.default_rng(0))
            for ranks in RANKS:
                times, errors = {FLOOR: add_ms}, dict[str, str]()
                for way, make in ways.makers.items():
                    try:
                        taken = _settle(make, residual, gradient, sent[:ranks], clock)
                        times[way] = summary(taken)
                    except Exception as error:  # whatever a compiler of kernels may raise
                        errors[way] = f"{type(error).__name__}: {error}"
                row = {"n": size, "density": density, "k": k, "ranks": ranks}
                keep(row | {"ms": times, "errors": errors})


def _settle(
    make: Make, residual: torch.Tensor, gradient: torch.Tensor, sent: Sent, clock: Clock
) -> Times:
    backend, (own, _) = make(), sent[0]
    # The sum takes the gradient's place, as in a training.
    residual, gradient = residual.clone(), gradient.clone()
    bounds = np.array([[0, len(indices)] for indices, _ in sent])
    received = Received(sent, bounds, table_of(sent))

    def launch(step: int) -> None:
        backend.settle(residual, gradient, own, None, received, 1 / len(sent), out=gradient)
        backend.finish()

    return clock.measure(launch)
