"""Where the time of a step goes: a look at the clock around each part of the work.

That is about a microsecond a layer and step, so it is always on (``benchmarks/insight.py``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter

PARTS = ("average", "find", "pack", "wait", "unpack", "settle", "balance")


@dataclass(frozen=True)
class Seconds:
    """Seconds that compression took on this rank, by the clock.

    Attributes:
        average: copying gradients for the host's average; 0 without ``hierarchical``.
        find: clipping, momentum and selection.  Of layers on a device: launching it, and waiting
            for what it found.
        pack: writing payloads.
        wait: for other ranks, with nothing of the above or below to do meanwhile.  In TensorFlow,
            from the last that this rank had to send until everything had come in.
        unpack: reading and checking what came in.
        settle: writing residuals and sums.
        balance: moving the ratios.
        total: in which Horovod's calls kept the training's own thread, with what Python does
            around the parts.  Where other threads do the work (TensorFlow), the sum of the parts.
            With ``hierarchical`` in torch a thread works on parts meanwhile, and the total may be
            less than their sum.
    """

    average: float = 0.0
    find: float = 0.0
    pack: float = 0.0
    wait: float = 0.0
    unpack: float = 0.0
    settle: float = 0.0
    balance: float = 0.0
    total: float = 0.0


class Stopwatch:
    """Adds up the seconds of the step in progress.

    Attributes:
        seconds: so far, of each of PARTS.  Written by whoever works, with the session's lock held
            where there are several threads; "wait" by the thread that waits.
        ended: when the last step ended, as ``perf_counter`` tells; minus infinity before one.
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.ended = float("-inf")
        self._total = 0.0
        self._entered: float | None = None
        self._sent: float | None = None

    def enter(self) -> bool:
        """The training's own thread comes in; False if it has before, and need not ``leave``."""
        if self._entered is not None:
            return False
        self._entered = perf_counter()
        return True

    def leave(self) -> None:
        """The training's own thread goes out."""
        if self._entered is not None:
            self._total += perf_counter() - self._entered
            self._entered = None

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """For the block in which other ranks are waited for; what is worked in it counts apart."""
        begun, worked = perf_counter(), sum(self.seconds.values())
        try:
            yield
        finally:
            worked = sum(self.seconds.values()) - worked
            self.seconds["wait"] += max(0.0, perf_counter() - begun - worked)

    def sent(self) -> None:
        """This rank has something on its way."""
        self._sent = perf_counter()

    def arrived(self) -> None:
        """Everything has come in: what has passed since the last was ``sent`` was a wait."""
        if self._sent is not None:
            self.seconds["wait"] += perf_counter() - self._sent
            self._sent = None

    def lap(self) -> Seconds:
        """The step ends: its seconds, and the next one begins."""
        self.ended = now = perf_counter()
        if self._entered is not None:
            self._total, self._entered = self._total + now - self._entered, now
        parts = self.seconds
        taken = Seconds(**parts, total=self._total or sum(parts.values()))
        self.reset()
        return taken

    def reset(self) -> None:
        """The step is given up or skipped: its seconds count for nothing."""
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._total, self._sent = 0.0, None
