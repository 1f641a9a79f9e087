"""Large layers in parts, each on a thread of its own; the same bits, however many there are.

(If all threads take subnormal numbers for what they are, which TensorFlow's do not by themselves:
see tensorflow/turns.py.  Ours start as the thread is that first needs them.)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

# Entries of a part.  One thread nearly uses up memory's bandwidth where it was measured: two are
# faster than one from 25 million entries on, and not below (python -m benchmarks.results --only
# threads).
_LEAST = 1 << 23
_AT_ALL = 64  # threads that are ever started
_MOST = 4  # threads of a process, if nobody asks for more: memory's bandwidth is shared by all
T = TypeVar("T")
R = TypeVar("R")

_count = 1
_pool: ThreadPoolExecutor | None = None


def use(count: int) -> None:
    """Sets the number of threads of this process that work on a layer."""
    global _count
    _count = count


def to_spare(local_size: int) -> int:
    """Threads for a process, if ``local_size`` of them share the host's cores.

    At most OMP_NUM_THREADS, if that is set: whoever limits the framework's threads means ours too.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    limit = os.environ.get("OMP_NUM_THREADS", "")
    most = min(_MOST, int(limit)) if limit.isdecimal() else _MOST
    return max(1, min(most, (cores or 1) // max(1, local_size)))


def of_use(n: int) -> bool:
    """Whether a layer of n entries is to be worked on in parts."""
    return _count > 1 and n >= 2 * _LEAST


def parts(n: int, multiple: int) -> list[tuple[int, int]]:
    """Where the parts of n entries begin and end: at multiples of ``multiple``, but for the end."""
    count = min(_count, n // _LEAST)
    each = -(-n // (count * multiple)) * multiple
    return [(start, min(start + each, n)) for start in range(0, n, each)]


def each(function: Callable[[T], R], arguments: Sequence[T]) -> list[R]:
    """``function`` of each argument, on a thread for each; this one takes the first."""
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(_AT_ALL, "hvd_dls")  # it starts as many as are asked for
    others = [_pool.submit(function, argument) for argument in arguments[1:]]
    return [function(arguments[0]), *(other.result() for other in others)]
