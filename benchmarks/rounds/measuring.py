"""What a rank needs to measure a step together with the others: a barrier, counters, gathering."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import horovod.torch as hvd
import numpy as np
import torch

INTERFACES = Path("/proc/self/net/dev")


def wait_for_all() -> None:
    """Waits for all ranks, asleep: Horovod's own barrier would spin on a processor."""
    handle = hvd.allreduce_async(torch.zeros(1), name="wait for all")
    while not hvd.poll(handle):
        time.sleep(0.0003)
    hvd.synchronize(handle)


def interface_bytes(interface: str | None) -> np.ndarray:
    """Returns (2,) bytes that the kernel counted at an interface so far: received and sent.

    Args:
        interface: its name; None: zeros are returned.
    """
    if interface is None:
        return np.zeros(2)
    for line in INTERFACES.read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == interface:
            columns = numbers.split()
            return np.array([int(columns[0]), int(columns[8])], float)
    raise SystemExit(f"there is no network interface {interface!r} here")


def gather(numbers: Sequence[float] | Sequence[list[float]], name: str) -> np.ndarray:
    """Returns (ranks, ...) numbers of all ranks.

    Args:
        numbers: this rank's, as many as every other rank's.
        name: of the operation.
    """
    mine = torch.from_numpy(np.array(numbers, np.float64)[None])
    everyone: np.ndarray = hvd.allgather(mine, name=f"gathered.{name}").numpy()
    return everyone
