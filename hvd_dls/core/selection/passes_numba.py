"""The passes, compiled: their memory, and large layers in parts on several threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hvd_dls.core.balancing.sketch import WINDOW, Sketch
from hvd_dls.core.bits import LANES
from hvd_dls.core.received import table_of
from hvd_dls.core.selection import find_loops, settle_loops, threads
from hvd_dls.core.selection.passes_numpy import sample_stride

_MARGIN = 0.7  # part of the last threshold above which candidates are looked for
_nothing: dict[str, np.ndarray] = {"f": np.empty(0, np.float32), "d": np.empty(0, np.float64)}


class _Scratch:
    """Memory for one layer, or a part of one; what is in it lasts for one call."""

    def __init__(self) -> None:
        # Histogram of the sample; of digits, to find the k-th largest; bins of a chunk's entries.
        width = max(find_loops.BINS, find_loops.DIGITS, find_loops.CHUNK)
        self.tables = np.zeros((3, width), np.uint32)
        self._indices = np.empty(0, np.uint32)
        self._values = dict(_nothing)
        width = settle_loops.WIDEST
        self.totals: dict[str, np.ndarray] = {
            "f": np.zeros(width, np.float32),
            "d": np.zeros(width, np.float64),
        }

    def candidates(self, dtype: np.dtype[Any], room: int) -> tuple[np.ndarray, np.ndarray]:
        """Indices and values, at least ``room`` of each."""
        if len(self._indices) < room:
            self._indices = np.empty(room, np.uint32)
        if len(self._values[dtype.char]) < room:
            self._values[dtype.char] = np.empty(room, dtype)
        return self._indices, self._values[dtype.char]


class _OfThread(threading.local):
    """What all calls of a thread share: for whole layers, and for the parts of one."""

    def __init__(self) -> None:
        self.whole = _Scratch()
        self.parts: list[_Scratch] = []

    def of_parts(self, count: int) -> list[_Scratch]:
        self.parts += [_Scratch() for _ in range(count - len(self.parts))]
        return self.parts[:count]


_scratch = _OfThread()


def _numbered(array: np.ndarray) -> np.ndarray:
    """float16 as int16, see ``bits``."""
    return array.view(np.int16) if array.dtype.char == "e" else array


# Find -------------------------------------------------------------------------------------------


def find(
    residual: np.ndarray, gradient: np.ndarray, k: int, last_threshold: float
) -> tuple[np.ndarray, np.ndarray, float, Sketch] | None:
    """See ``passes.find``."""
    n, dtype, own = len(residual), residual.dtype, _scratch.whole
    gradient, bound, stride = _numbered(gradient), _MARGIN * last_threshold, sample_stride(n)
    indices, values = np.empty(k, np.uint32), np.empty(k, dtype)
    results = (indices, values, np.empty(WINDOW, np.uint32))
    if threads.of_use(n):
        where, what, count = _collect(residual, gradient, k, bound, stride)
        found = find_loops.finish(where, what, count, k, stride, own.tables, *results)
    else:
        room = min(2 * k, n) + find_loops.CHUNK
        where, what = own.candidates(dtype, room + LANES)
        found = find_loops.find(
            residual, gradient, k, bound, stride, where, what, room, own.tables, *results
        )
    base, threshold = found
    return None if base < 0 else (indices, values, threshold, Sketch(base, results[2]))


def _collect(
    residual: np.ndarray, gradient: np.ndarray, k: int, bound: float, stride: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """The candidates of all parts, in order, and their number; their sample's histogram."""
    whole, parts = _scratch.whole, threads.parts(len(residual), LANES)
    tasks = list(zip(parts, _scratch.of_parts(len(parts)), strict=True))

    def scan(task: tuple[tuple[int, int], _Scratch]) -> int:
        (start, stop), own = task
        room = min(2 * k, stop - start) + find_loops.CHUNK
        where, what = own.candidates(residual.dtype, room + LANES)
        count: int = find_loops.scan(
            residual, gradient, start, stop, k, bound, stride, where, what, room, own.tables
        )
        return count

    for attempt in range(3):  # as in ``find_loops.find``
        if attempt:
            first = attempt == 1
            bound = find_loops.next_bound(whole.tables[0], k, stride) if first else 0.0
        counts = threads.each(scan, tasks)
        np.sum([own.tables[0] for _, own in tasks], axis=0, out=whole.tables[0])
        if sum(counts) >= k:
            break
    where, what = whole.candidates(residual.dtype, sum(counts) + LANES)
    start = 0
    for count, (_, own) in zip(counts, tasks, strict=True):
        indices, values = own.candidates(residual.dtype, count)
        where[start : start + count] = indices[:count]
        what[start : start + count] = values[:count]
        start += count
    return where, what, start


def finite(values: np.ndarray) -> bool:
    """See ``passes.finite``."""
    return bool(find_loops.finite(_numbered(values)))


def reaching(values: np.ndarray, least: np.floating[Any]) -> np.ndarray:
    """See ``passes.reaching``."""
    places = np.empty(len(values), np.int64)  # of which only what is written takes memory
    return places[: find_loops.places(values, least, places)]


# Settle -----------------------------------------------------------------------------------------


def settle(
    residual: np.ndarray,
    gradient: np.ndarray,
    indices: np.ndarray,
    kept: np.ndarray | None,
    received: Sequence[tuple[np.ndarray, np.ndarray]],
    scale: float,
    out: np.ndarray,
) -> None:
    """See ``passes.settle``."""
    dtype = residual.dtype
    gradient, out, factor = _numbered(gradient), _numbered(out), dtype.type(scale)
    left = _nothing[dtype.char] if kept is None else kept

    def settle_part(start: int, stop: int, table: np.ndarray, total: np.ndarray) -> bool:
        in_order: bool = settle_loops.settle(
            residual, gradient, start, stop, indices, left, table, factor, out, total
        )
        return in_order

    _in_parts(len(residual), dtype, received, settle_part)


def sum_up(
    received: Sequence[tuple[np.ndarray, np.ndarray]],
    scale: float,
    out: np.ndarray,
    dtype: np.dtype[Any],
) -> None:
    """See ``passes.sum_up``."""
    result, factor = _numbered(out), dtype.type(scale)

    def sum_part(start: int, stop: int, table: np.ndarray, total: np.ndarray) -> bool:
        in_order: bool = settle_loops.sum_up(start, stop, table, factor, result, total)
        return in_order

    _in_parts(len(out), dtype, received, sum_part)


def _in_parts(
    n: int,
    dtype: np.dtype[Any],
    received: Sequence[tuple[np.ndarray, np.ndarray]],
    work: Callable[[int, int, np.ndarray, np.ndarray], bool],
) -> None:
    """Calls a loop for a whole layer of n entries, or for its parts on several threads."""
    table = table_of(received)

    def part(task: tuple[tuple[int, int], _Scratch]) -> bool:
        (start, stop), own = task
        if stop == n:
            stop = settle_loops.END  # so that what lies beyond the layer is seen
        return work(start, stop, table, own.totals[dtype.char])

    if threads.of_use(n):
        parts = threads.parts(n, settle_loops.BLOCK)
        tasks = zip(parts, _scratch.of_parts(len(parts)), strict=True)
        good = all(threads.each(part, list(tasks)))
    else:
        good = part(((0, n), _scratch.whole))
    if not good:
        raise ValueError(f"indices must ascend and stay below {n}")
