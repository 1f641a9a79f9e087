"""How long it takes to find the largest entries of a layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu.clock import Clock, summary
from benchmarks.gpu.methods import FLOOR, SAMPLED, TOPK, Layer, floor, is_exact, ours, sampled, topk
from benchmarks.gpu.noise import Noise
from benchmarks.gpu.passes import Ways

SIZES = [100_000, 1_000_000, 10_000_000, 25_000_000, 100_000_000]
DENSITIES = [1e-4, 1e-3, 1e-2, 1e-1]
REPEATS, QUICK_REPEATS = 12, 3


def rows_of(
    device: torch.device, ways: Ways, quick: bool, keep: Callable[[dict[str, Any]], None]
) -> None:
    """Measures all methods on all sizes and densities.

    Args:
        device: where.
        ways: in which this package finds them.
        quick: up to a million entries, and few repetitions.
        keep: is given each row of figures.
    """
    clock = Clock(device, QUICK_REPEATS if quick else REPEATS)
    for size in SIZES:
        if quick and size > 1_000_000:
            continue
        noise = Noise(size, device)
        scratch = torch.empty_like(noise.gradients[0])
        for density in DENSITIES:
            k = max(1, round(density * size))
            layer = Layer(noise.residual(k), noise.gradients, scratch, k)
            keep({"n": size, "density": density, "k": k, **_measured(layer, ways, clock)})


def _measured(layer: Layer, ways: Ways, clock: Clock) -> dict[str, Any]:
    """Measures all methods on one layer; one that fails does not end the others."""
    methods = {FLOOR: floor(layer), TOPK: topk(layer), SAMPLED: sampled(layer)}
    own = {way: ours(layer, make) for way, make in ways.makers.items()}
    times: dict[str, Any] = {}
    exact: dict[str, bool] = {}
    again: dict[str, list[int]] = {}
    errors: dict[str, str] = {}
    for name, method in (methods | own).items():
        try:
            times[name] = summary(clock.measure(method.launch, method.finish))
            if name in own:
                exact[name] = is_exact(layer, method)
            if method.again and method.again.known:
                again[name] = [method.again.times, method.again.steps]
        except Exception as error:  # memory that is not enough, a compiler of kernels
            errors[name] = f"{type(error).__name__}: {error}"
    return {"ms": times, "exact": exact, "again": again, "errors": errors}
