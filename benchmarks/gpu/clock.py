"""Times of the device and of the host.

Three times are taken of what the host has a device do:

- "device": between two events around the work, with all of it queued before the device comes to
  it, so that a slow host leaves no gaps (counted are those of a method that waits for the device,
  or keeps the host busy for longer than the longest sleep below);
- "host": until the call returns, without waiting for the device;
- "elapsed": until the result is there.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

Times = dict[str, list[float]]  # milliseconds of each repetition, by "device", "host", "elapsed"

_FLUSH_BYTES = 256 << 20  # several times the second-level cache of any GPU
_CYCLES = 2.0e6  # a millisecond at the highest clock rate; at others it is longer
_LONGEST_SLEEP = 150.0  # milliseconds
_WARM_UP = 4


def statistics_of(values: list[float]) -> dict[str, float]:
    """Computes median and extremes."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def summary(times: Times) -> dict[str, dict[str, float]]:
    """Computes median and extremes of each kind of time that was taken."""
    return {kind: statistics_of(values) for kind, values in times.items() if values}


class Clock:
    """Measures work on one device.

    Args:
        device: where.
        repeats: how often; after a warm-up.
    """

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device, self.repeats = device, repeats
        self.cuda = device.type == "cuda"
        self._flushed = torch.empty(_FLUSH_BYTES if self.cuda else 0, dtype=torch.int8)
        self._flushed = self._flushed.to(device)

    def synchronize(self) -> None:
        """Waits for the device."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def sleep(self, milliseconds: float) -> None:
        """Has the device do nothing for at least so long; the host goes on."""
        if self.cuda:
            torch.cuda._sleep(math.ceil(milliseconds * _CYCLES))

    def event(self) -> Any:
        """Records an event behind what the device has been given."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def measure(
        self, launch: Callable[[int], Any], finish: Callable[[Any], Any] | None = None
    ) -> Times:
        """Measures one piece of work, with cold second-level caches.

        Args:
            launch: starts it; given the number of the repetition.
            finish: given what ``launch`` returned, waits for the result; None: the result is what
                the device has then.

        Returns:
            Milliseconds; none of the device itself where the device is the CPU.
        """
        times: Times = {"device": [], "host": [], "elapsed": []}
        finish = finish or (lambda started: self.synchronize())
        for number in range(_WARM_UP + self.repeats):
            host, elapsed = self._by_the_host(launch, finish, number)
            if number >= _WARM_UP:
                times["host"].append(host)
                times["elapsed"].append(elapsed)
        if self.cuda:
            # Long enough for the host to queue everything.
            sleep = min(1.5 * statistics.median(times["host"]) + 0.5, _LONGEST_SLEEP)
            for number in range(self.repeats):
                times["device"].append(self._by_events(launch, finish, number, sleep))
        return times

    def _by_the_host(
        self, launch: Callable[[int], Any], finish: Callable[[Any], Any], number: int
    ) -> tuple[float, float]:
        self._flushed.zero_()
        self.synchronize()
        start = time.perf_counter()
        started = launch(number)
        launched = time.perf_counter()
        finish(started)
        done = time.perf_counter()
        self.synchronize()
        return 1e3 * (launched - start), 1e3 * (done - start)

    def _by_events(
        self,
        launch: Callable[[int], Any],
        finish: Callable[[Any], Any],
        number: int,
        sleep: float,
    ) -> float:
        self._flushed.zero_()
        self.sleep(sleep)
        start = self.event()
        started = launch(number)
        end = self.event()
        finish(started)
        self.synchronize()
        elapsed: float = start.elapsed_time(end)
        return elapsed
