"""Memory of the device that compression takes, beside model and gradients."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.common.shapes import MODELS
from benchmarks.gpu.clock import Clock
from benchmarks.gpu.model import Gradients, Model
from benchmarks.gpu.passes import Ways
from benchmarks.gpu.stepping import RANKS, WARM_UP, models

DENSITIES = [1e-3, 1e-2]


def rows_of(
    device: torch.device, ways: Ways, quick: bool, keep: Callable[[dict[str, Any]], None]
) -> None:
    """Measures all models, densities and ways.

    Args:
        device: where; of a CPU nothing is measured, and each row says so.
        ways: in which this package makes the passes.
        quick: small models.
        keep: is given each row of figures.
    """
    clock = Clock(device, 1)
    for name in models(quick):
        shapes = MODELS[name]()
        gradients = Gradients(shapes, device)
        for density in DENSITIES:
            for way, make in ways.makers.items():
                row = {"model": name, "method": way, "density": density, "ranks": RANKS}
                row["gradient_bytes"] = 4 * gradients.entries
                before = _allocated(clock)
                model = Model(shapes, gradients, density, make, RANKS)
                for _ in range(WARM_UP):
                    model.step()
                if clock.cuda:
                    steady = _allocated(clock) - before
                    torch.cuda.reset_peak_memory_stats(device)
                    model.step()
                    clock.synchronize()
                    peak = torch.cuda.max_memory_allocated(device) - before
                    row |= {"steady_bytes": steady, "peak_bytes": peak}
                else:
                    row["note"] = "a CPU: not measured"
                keep(row)
                del model


def _allocated(clock: Clock) -> int:
    gc.collect()  # the model before this one
    clock.synchronize()
    return torch.cuda.memory_allocated(clock.device) if clock.cuda else 0
