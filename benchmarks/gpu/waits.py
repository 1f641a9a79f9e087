"""Where the host waits for the device in a step.

Three witnesses.  A device that sleeps when a layer comes in: who is back before it wakes has not
waited for it.  torch's own warnings of operations that wait.  The profiler's record of calls of
CUDA that may wait, where the machine has what it needs for one.
"""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.common.shapes import MODELS
from benchmarks.gpu.clock import Clock
from benchmarks.gpu.model import Gradients, Model
from benchmarks.gpu.passes import Ways
from benchmarks.gpu.stepping import RANKS, WARM_UP, models

DENSITY = 1e-2
COMPRESS, REST = "compress", "rest"

_SLEEP = 8.0  # milliseconds, many times what a layer's launches take
# Calls in which the host waits, or may wait: whatever of these is found is counted by its name.
_MAY_WAIT = (
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "cudaEventSynchronize",
    "cudaMemcpy",
    "cudaMalloc",
    "cudaFree",
    "cudaHostAlloc",
    "cudaFreeHost",
    "cuCtxSynchronize",
    "cuStreamSynchronize",
    "cuEventSynchronize",
)
_LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaMemcpyAsync", "cudaMemsetAsync")


def rows_of(
    device: torch.device, ways: Ways, quick: bool, keep: Callable[[dict[str, Any]], None]
) -> None:
    """Looks at all models and ways.

    Args:
        device: where; on a CPU there is nothing to wait for, and each row says so.
        ways: in which this package makes the passes.
        quick: small models.
        keep: is given each row of figures.
    """
    clock = Clock(device, 1)
    for name in models(quick):
        shapes = MODELS[name]()
        gradients = Gradients(shapes, device)
        for way, make in ways.makers.items():
            model = Model(shapes, gradients, DENSITY, make, RANKS)
            for _ in range(WARM_UP):
                model.step()
            row: dict[str, Any] = {"model": name, "method": way, "layers": len(shapes)}
            if clock.cuda:
                row["behind_sleep"] = behind_sleep(model, clock)
                row["warnings"] = warnings_of_torch(model, clock)
                row["calls"] = profiled(model, clock)
            else:
                row["note"] = "a CPU: nothing to wait for"
            keep(row)


def behind_sleep(model: Model, clock: Clock) -> dict[str, Any]:
    """Has each layer come in while the device sleeps.

    Returns:
        In how many layers the host was back before the device woke, in how many not; and the
        longest time that a layer took the host, in milliseconds.
    """
    model.draw()
    model.begin()
    waited, longest = [], 0.0
    for name in model.order:
        clock.synchronize()
        clock.sleep(_SLEEP)
        woke = clock.event()
        start = time.perf_counter()
        model.come_in(name)
        model.pack_ready()
        longest = max(longest, 1e3 * (time.perf_counter() - start))
        if woke.query():
            waited.append(name)
    model.receive(model.payloads())
    model.decompress()
    clock.synchronize()
    return {
        "did_not_wait": len(model.order) - len(waited),
        "waited": waited,
        "longest_ms": longest,
    }


@contextmanager
def _debugging(mode: str) -> Iterator[None]:
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def warnings_of_torch(model: Model, clock: Clock) -> dict[str, Any]:
    """Counts the operations of which torch says that they wait; it does not know of events."""
    counts = {}
    model.draw()
    model.begin()
    clock.synchronize()
    for part, work in _parts(model).items():
        with warnings.catch_warnings(record=True) as caught, _debugging("warn"):
            warnings.simplefilter("always")
            work()
        said = [str(warning.message) for warning in caught]
        counts[part] = sum("synchronizing CUDA operation" in text for text in said)
    return counts


def profiled(model: Model, clock: Clock) -> dict[str, Any]:
    """Counts calls of CUDA in both parts of a step, and sums up what the device was busy with."""
    from torch.profiler import ProfilerActivity, profile, record_function

    model.draw()
    model.begin()
    clock.synchronize()
    try:
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            for part, work in _parts(model).items():
                with record_function(f"part {part}"):
                    work()
            clock.synchronize()
        events = list(profiler.events())
    except RuntimeError as error:  # of the profiler
        if model.session.in_step:
            model.session.abandon()
        return {"note": f"not profiled: {error}"}
    return _counted(events)


def _counted(events: list[Any]) -> dict[str, Any]:
    """Sorts the profiler's events into the parts of the step."""
    if not any(event.name.startswith(_LAUNCHES) for event in events):
        return {"note": "not counted: the profiler has no records of CUDA here"}
    counted: dict[str, Any] = {}
    for part in (COMPRESS, REST):
        # On the host's side: the same name stands on the device's side for its work, too.
        whole = next(
            event
            for event in events
            if event.name == f"part {part}" and event.device_type == torch.autograd.DeviceType.CPU
        )
        within = [
            event
            for event in events
            if whole.time_range.start <= event.time_range.start <= whole.time_range.end
            and event.device_type == torch.autograd.DeviceType.CPU
        ]
        calls = Counter(event.name for event in within if event.name in _MAY_WAIT)
        milliseconds: Counter[str] = Counter()
        for event in within:
            if event.name in _MAY_WAIT:
                milliseconds[event.name] += event.time_range.elapsed_us() / 1e3
        counted[part] = {
            "calls": dict(calls),
            "ms": dict(milliseconds),
            "launches": sum(event.name.startswith(_LAUNCHES) for event in within),
        }
    busy = [
        event.time_range.elapsed_us()
        for event in events
        if event.device_type == torch.autograd.DeviceType.CUDA
        and not event.name.startswith("part ")
    ]
    counted["device_busy_ms"] = sum(busy) / 1e3
    counted["device_operations"] = len(busy)
    return counted


def _parts(model: Model) -> dict[str, Callable[[], None]]:
    def rest() -> None:
        model.receive(model.payloads())
        model.decompress()

    return {COMPRESS: model.compress, REST: rest}
