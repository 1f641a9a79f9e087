"""Methods take turns: in each round, each of them makes some steps; the same for all frameworks."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from benchmarks.common.method import Method

MOST_STEPS = 40  # in a turn
# By the clock; of the thread that trains on a processor, and of the process on all of them.
CLOCKS = (time.perf_counter, time.thread_time, time.process_time)

Gather = Callable[[Sequence[list[float]], str], np.ndarray]
Turn = dict[str, list[float]]


def read_clocks() -> np.ndarray:
    """Reads CLOCKS: (3,) seconds."""
    return np.array([clock() for clock in CLOCKS])


class Running(Protocol):
    """A method that makes steps, such as ``benchmarks.rounds.methods.RunningMethod``."""

    method: Method
    first_steps: int

    def step(self, interface: str | None = None) -> list[float]:
        """Does one step; returns its seconds by each of CLOCKS, bytes received and sent."""

    def forget_records(self) -> None:
        """Forgets the steps so far."""


class Rounds:
    """Warm-ups, and rounds in which methods take turns, in another order in each.

    Args:
        running: the methods.
        args: rounds, warmup, turn_seconds, profile_steps, and perhaps the interface to count at.
        gather: returns (ranks, ...) numbers of all ranks.
        rank: this one; 0 tells what goes on.
    """

    def __init__(
        self, running: Sequence[Running], args: argparse.Namespace, gather: Gather, rank: int
    ) -> None:
        self._running, self._args, self._gather, self._rank = running, args, gather, rank
        self._total = len(running) * (args.rounds + 1) + bool(args.profile_steps)
        self._done = 0

    def take_turns(self) -> dict[str, list[Turn]]:
        """Measures all rounds; returns the turns of each method."""
        steps = []
        for each in self._running:
            self._show(f"warming up {each.method.name}")
            steps.append(self._warm_up(each))
        turns: dict[str, list[Turn]] = {each.method.name: [] for each in self._running}
        for number in range(self._args.rounds):
            for i in np.random.default_rng(number).permutation(len(self._running)):
                each = self._running[i]
                self._show(f"round {number + 1}: {each.method.name}")
                turns[each.method.name].append(self._measure(each, steps[i]))
        self._show("profile" if self._args.profile_steps else "done")
        return turns

    def _show(self, what: str) -> None:
        if self._rank == 0:
            print(f"PROGRESS {self._done}/{self._total} {what}", flush=True)
        self._done += 1

    def _warm_up(self, running: Running) -> int:
        """Does some steps, so that ratios settle; returns how many a turn should have."""
        seconds = self._args.turn_seconds
        sparse = running.method.density is not None
        first = running.first_steps + (seconds >= 10)
        taken = [running.step()[0] for _ in range(self._args.warmup if sparse else first)]
        longest = float(self._gather([[taken[-1]]], "warm").max())
        running.forget_records()
        return int(np.clip(round(seconds / longest), 1, MOST_STEPS))

    def _measure(self, running: Running, steps: int) -> Turn:
        """Of each step, the slowest rank's seconds, the most bytes that a rank received, and means
        over ranks of all else."""
        interface = getattr(self._args, "interface", None)
        taken = self._gather([running.step(interface) for _ in range(steps)], f"taken.{steps}")
        return {
            "seconds": taken[:, :, 0].max(axis=0).tolist(),
            "thread_seconds": taken[:, :, 1].mean(axis=0).tolist(),
            "cpu_seconds": taken[:, :, 2].mean(axis=0).tolist(),
            "received_bytes": taken[:, :, 3].mean(axis=0).tolist(),
            "most_received_bytes": taken[:, :, 3].max(axis=0).tolist(),
            "sent_bytes": taken[:, :, 4].mean(axis=0).tolist(),
        }
