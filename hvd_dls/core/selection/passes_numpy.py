"""The passes in NumPy, block by block: for machines without numba, and to check it against."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from hvd_dls.core.balancing.sketch import BELOW, LAST_BASE, SAMPLE, WINDOW, Sketch, bin_of

_BLOCK = 1 << 16  # entries worked on at once: what is needed of them stays in cache
_MARGIN = 0.7  # part of the last threshold above which candidates are looked for


def find(
    residual: np.ndarray, gradient: np.ndarray, k: int, last_threshold: float
) -> tuple[np.ndarray, np.ndarray, float, Sketch] | None:
    """See ``passes.find``."""
    number = residual.dtype.type
    with np.errstate(all="ignore"):  # overflow and NaN are looked for
        bound = number(_MARGIN * last_threshold if last_threshold > 0 else 0)
        candidates = _candidates(residual, gradient, k, bound)
        if candidates is not None and len(candidates[0]) < k:
            candidates = _candidates(residual, gradient, k, number(0))
        if candidates is None:
            return None
        indices, values, sample, stride = candidates
        chosen, threshold = _largest(np.abs(values), k)
        indices, values = indices[chosen], values[chosen]
        return indices, values, threshold, _sketch(indices, values, threshold, sample, stride)


def _candidates(
    residual: np.ndarray, gradient: np.ndarray, k: int, bound: np.floating
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int] | None:
    """Indices and values among which the k largest are; every stride-th magnitude; the stride.

    Fewer than k come back if fewer reach the bound; None if something is not finite.
    """
    stride = sample_stride(len(residual))
    parts: list[tuple[np.ndarray, np.ndarray]] = []
    sample, count = [], 0
    for start in range(0, len(residual), _BLOCK):
        block = slice(start, start + _BLOCK)
        total = residual[block] + widened(gradient[block])
        magnitude = np.abs(total)
        if not np.isfinite(magnitude.max()):
            return None
        sample.append(magnitude[-start % stride :: stride])
        hits = np.flatnonzero(magnitude >= bound)
        parts.append(((hits + start).astype(np.uint32), total[hits]))
        count += len(hits)
        if count > 2 * k + _BLOCK:  # keep the k largest: nothing below them can be among the k
            indices, values = _joined(parts)
            chosen, threshold = _largest(np.abs(values), k)
            parts, count = [(indices[chosen], values[chosen])], k
            bound = np.nextafter(residual.dtype.type(threshold), residual.dtype.type(np.inf))
    return *_joined(parts), np.concatenate(sample), stride


def _joined(parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    indices, values = zip(*parts, strict=True)
    return np.concatenate(indices), np.concatenate(values)


def _largest(magnitudes: np.ndarray, k: int) -> tuple[np.ndarray, float]:
    """Ascending positions of the k largest, ties to the lower one, and the smallest of them."""
    threshold = np.partition(magnitudes, len(magnitudes) - k)[len(magnitudes) - k]
    chosen = magnitudes > threshold
    ties = np.flatnonzero(magnitudes == threshold)
    chosen[ties[: k - np.count_nonzero(chosen)]] = True
    return np.flatnonzero(chosen), float(threshold)


def sample_stride(n: int) -> int:
    """Distance of sampled entries: about n / SAMPLE, never in step with kernels and channels."""
    stride = max(1, n // SAMPLE)
    while math.gcd(stride, n) > 1:
        stride += 1
    return stride


def _sketch(
    indices: np.ndarray, values: np.ndarray, threshold: float, sample: np.ndarray, stride: int
) -> Sketch:
    """Counts what was sent exactly, and each of the others sampled for ``stride`` entries."""
    base = min(max(int(bin_of(np.array([threshold]))[0]) - BELOW, 0), LAST_BASE)
    unsent = bin_of(sample)
    unsent[indices[indices % stride == 0] // stride] = 0
    unsent = unsent[unsent >= max(base, 1)]  # bin 0: zeros, which nobody sends
    counts = _histogram(bin_of(np.abs(values)) - base) + stride * _histogram(unsent - base)
    return Sketch(base, counts.astype(np.uint32))


def _histogram(bins: np.ndarray) -> np.ndarray:
    return np.bincount(np.minimum(bins, WINDOW - 1), minlength=WINDOW)


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
    check_ascending([indices], len(residual))
    sums = _sums(received, scale, len(residual), residual.dtype)
    for start, total in sums:
        block = slice(start, start + len(total))
        with np.errstate(all="ignore"):
            residual[block] += widened(gradient[block])
            narrow(total, out[block])
    residual[indices] = 0 if kept is None else kept


def finite(values: np.ndarray) -> bool:
    """See ``passes.finite``."""
    blocks = (values[start : start + _BLOCK] for start in range(0, len(values), _BLOCK))
    return all(np.isfinite(widened(block)).all() for block in blocks)


def reaching(values: np.ndarray, least: np.floating) -> np.ndarray:
    """See ``passes.reaching``."""
    bits = f"u{values.itemsize}"  # which order magnitudes, and NaN above all of them
    return np.flatnonzero(np.abs(values).view(bits) >= least.view(bits))


def sum_up(
    received: Sequence[tuple[np.ndarray, np.ndarray]],
    scale: float,
    out: np.ndarray,
    dtype: np.dtype,
) -> None:
    """See ``passes.sum_up``."""
    for start, total in _sums(received, scale, len(out), dtype):
        with np.errstate(all="ignore"):
            narrow(total, out[start : start + len(total)])


def _sums(
    received: Sequence[tuple[np.ndarray, np.ndarray]], scale: float, n: int, dtype: np.dtype
) -> Iterator[tuple[int, np.ndarray]]:
    """What all ranks sent, added up in rank order: each block's start, and its scaled sums."""
    factor = dtype.type(scale)
    check_ascending([entries for entries, _ in received], n)
    edges = np.arange(0, n + _BLOCK, _BLOCK)
    cuts = [np.searchsorted(entries, edges) for entries, _ in received]
    for block, start in enumerate(edges[:-1].tolist()):
        total = np.zeros(min(_BLOCK, n - start), dtype)
        touched = np.zeros(len(total), np.bool_)
        with np.errstate(all="ignore"):
            for (entries, values), cut in zip(received, cuts, strict=True):
                part = slice(cut[block], cut[block + 1])
                where = entries[part] - np.uint32(start)
                total[where] += values[part]  # indices are unique within a rank
                touched[where] = True
            total[touched] *= factor  # zero times a negative factor would be -0
        yield start, total


def check_ascending(lists: Sequence[np.ndarray], n: int) -> None:
    """Raises ValueError unless each list of indices ascends strictly and stays below n."""
    for entries in lists:
        if len(entries) and (entries[-1] >= n or (entries[1:] <= entries[:-1]).any()):
            raise ValueError(f"indices must ascend and stay below {n}")


# Dtypes -----------------------------------------------------------------------------------------


def widened(gradient: np.ndarray) -> np.ndarray:
    """Gradient entries in a dtype that adds: bfloat16 (bits in uint16) and float16 in float32."""
    if gradient.dtype == np.uint16:
        return (gradient.astype(np.uint32) << 16).view(np.float32)
    return gradient.astype(np.float32) if gradient.dtype == np.float16 else gradient


def narrow(values: np.ndarray, out: np.ndarray) -> None:
    """Writes values rounded to nearest, ties to even; bfloat16 where out is uint16."""
    if out.dtype != np.uint16:
        out[:] = values
        return
    bits = values.astype(np.float32, copy=False).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    out[:] = np.where(np.isnan(values), 0x7FC0, rounded)
