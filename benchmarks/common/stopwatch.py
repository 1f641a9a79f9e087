"""Measures where the time of a step goes: in DLS and in Horovod's optimizer for torch."""

from __future__ import annotations

import functools
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import horovod.torch.optimizer as horovod_optimizer

from benchmarks.common.internals import Controller, Session
from hvd_dls.torch.binding import Binding
from hvd_dls.torch.exchange import Exchange

# Where a part of a step is: a class or module, the name of its function, and what to call it.
PARTS: list[tuple[Any, str, str]] = [
    (Session, "_select", "find"),
    (Session, "contribution", "contribution: to the host's average"),
    (Session, "added_up", "take in contributions"),
    (Session, "parts", "parts: for owners"),
    (Session, "collected", "owners add up"),
    (Session, "payload", "pack"),
    (Exchange, "_start", "hand over payloads"),
    (Binding, "_receive_all", "wait for payloads"),
    (Session, "receive", "unpack"),
    (Session, "decompress", "settle"),
    (Controller, "advance", "move ratios"),
    (Binding, "compress", "binding, Python"),
    (Binding, "decompress", "binding, Python"),
    (horovod_optimizer, "allreduce_async_", "hand over allreduces"),
    (horovod_optimizer, "synchronize", "wait for allreduces"),
]


class Stopwatch:
    """Seconds spent in named parts of a step, without what other parts take within.

    Attributes:
        seconds: by the clock, of each part.
        cpu_seconds: in which their thread ran, of each part.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.cpu_seconds: dict[str, float] = defaultdict(float)
        self._local = threading.local()
        self._lock = threading.Lock()

    @property
    def _inner(self) -> list[tuple[float, float]]:
        """Of the calls under way in this thread: the times of the calls within."""
        if not hasattr(self._local, "inner"):
            self._local.inner = []
        inner: list[tuple[float, float]] = self._local.inner
        return inner

    def longest_first(self) -> list[tuple[str, float]]:
        """Returns the parts and their seconds by the clock."""
        return sorted(self.seconds.items(), key=lambda part: -part[1])

    @contextmanager
    def watching(self) -> Iterator[Stopwatch]:
        """Times all PARTS until the block ends."""
        before = [(owner, name, getattr(owner, name)) for owner, name, _ in PARTS]
        for owner, name, label in PARTS:
            setattr(owner, name, self._timed(getattr(owner, name), label))
        try:
            yield self
        finally:
            for owner, name, function in before:
                setattr(owner, name, function)

    def _timed(self, function: Callable[..., Any], label: str) -> Callable[..., Any]:
        """Wraps a function so that its time is added to a part."""

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            inner_times = self._inner
            inner_times.append((0.0, 0.0))
            start, cpu_start = time.perf_counter(), time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                taken, cpu = time.perf_counter() - start, time.thread_time() - cpu_start
                inner, cpu_inner = inner_times.pop()
                with self._lock:
                    self.seconds[label] += taken - inner
                    self.cpu_seconds[label] += cpu - cpu_inner
                if inner_times:
                    inner, cpu_inner = inner_times[-1]
                    inner_times[-1] = inner + taken, cpu_inner + cpu

        return timed
