"""Time of a whole step on one rank, beside copying all gradients to the host and back."""

from __future__ import annotations

import itertools
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.shapes import MODELS
from benchmarks.gpu.clock import Clock, statistics_of
from benchmarks.gpu.methods import FLOOR
from benchmarks.gpu.model import Gradients, Model, plain_add
from benchmarks.gpu.passes import Ways

SHAPES, QUICK_SHAPES = ("resnet50", "bert-base"), ("tiny",)
DENSITIES = [1e-3, 1e-2]
RANKS = 4
STEPS, QUICK_STEPS = 12, 3
WARM_UP = 6

DENSE, FP16 = "all gradients to the host and back", "the same as fp16"
PARTS = ["compress, host", "wait and pack", "unpack", "settle, host", "settle, device", "whole"]

Step = dict[str, float]  # milliseconds by part


def models(quick: bool) -> tuple[str, ...]:
    """Names of the shapes to measure."""
    return QUICK_SHAPES if quick else SHAPES


def rows_of(
    device: torch.device, ways: Ways, quick: bool, keep: Callable[[dict[str, Any]], None]
) -> None:
    """Measures all models, densities and ways.

    Args:
        device: where.
        ways: in which this package makes the passes.
        quick: small models, and few steps.
        keep: is given each row of figures.
    """
    clock = Clock(device, QUICK_STEPS if quick else STEPS)
    for name in models(quick):
        shapes = MODELS[name]()
        gradients = Gradients(shapes, device)
        about = {"model": name, "layers": len(shapes), "entries": gradients.entries}
        for method, step in others(list(gradients.tensors.values()), device).items():
            whole = [_timed(step, clock) for _ in range(WARM_UP + clock.repeats)][WARM_UP:]
            keep({**about, "method": method, "ms": {"whole": statistics_of(whole)}})
        for density in DENSITIES:
            for way, make in ways.makers.items():
                model = Model(shapes, gradients, density, make, RANKS)
                keep({**about, "method": way, "density": density, **_measured(model, clock)})


def _measured(model: Model, clock: Clock) -> dict[str, Any]:
    parts: dict[str, list[float]] = defaultdict(list)
    sent = 0
    for number in range(WARM_UP + clock.repeats):
        times, sent = _step(model, clock)
        for part, milliseconds in times.items():
            if number >= WARM_UP:
                parts[part].append(milliseconds)
    record = model.session.last_step
    assert record is not None
    return {
        "ranks": model.ranks,
        "payload_bytes": sent,
        "sent_entries": int(record.k.sum()),
        "compressed_layers": len(record.k),
        "checksum": model.checksum(),
        "ms": {part: statistics_of(values) for part, values in parts.items()},
    }


def _step(model: Model, clock: Clock) -> tuple[Step, int]:
    """Does a step; returns its times and the bytes of its payloads."""
    model.draw()
    model.begin()
    clock.synchronize()
    ends = [time.perf_counter()]
    model.compress()
    ends.append(time.perf_counter())
    payloads = model.payloads()
    ends.append(time.perf_counter())
    model.receive(payloads)
    ends.append(time.perf_counter())
    model.decompress()
    ends.append(time.perf_counter())
    clock.synchronize()
    ends.append(time.perf_counter())
    taken = [1e3 * (end - start) for start, end in itertools.pairwise(ends)]
    return dict(zip(PARTS, [*taken, sum(taken)], strict=True)), sum(map(len, payloads.values()))


def _timed(step: Callable[[], None], clock: Clock) -> float:
    clock.synchronize()
    start = time.perf_counter()
    step()
    clock.synchronize()
    return 1e3 * (time.perf_counter() - start)


def others(gradients: list[Tensor], device: torch.device) -> dict[str, Callable[[], None]]:
    """Makes what a step is compared with: each a function of nothing.

    Copies go layer by layer, through pinned memory that is there already, without waiting but at
    the end of each direction.  Nothing is sent anywhere.
    """
    residuals = [torch.zeros_like(gradient) for gradient in gradients]
    pin = device.type == "cuda"
    whole = [torch.empty(len(g), pin_memory=pin) for g in gradients]
    half = [torch.empty(len(g), dtype=torch.float16, pin_memory=pin) for g in gradients]

    def wait() -> None:
        if pin:
            torch.cuda.synchronize(device)

    def dense() -> None:
        for host, gradient in zip(whole, gradients, strict=True):
            host.copy_(gradient, non_blocking=True)
        wait()
        for host, gradient in zip(whole, gradients, strict=True):
            gradient.copy_(host, non_blocking=True)

    def fp16() -> None:
        for host, gradient in zip(half, gradients, strict=True):
            host.copy_(gradient.half(), non_blocking=True)
        wait()
        for host, gradient in zip(half, gradients, strict=True):
            gradient.copy_(host.to(device, non_blocking=True))

    return {FLOOR: lambda: plain_add(residuals, gradients), DENSE: dense, FP16: fp16}
