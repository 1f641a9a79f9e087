"""The two passes over a layer in a step: find what to send, and settle once all ranks have sent.

``find`` only looks.  What a step changes, ``settle`` changes, and that is called when the payloads
of all ranks are there and good: a step that fails leaves residual and gradient as they were.

The loops are compiled where numba is installed and blocked NumPy elsewhere: the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from hvd_dls.core.balancing.sketch import BELOW, LAST_BASE, WINDOW, Sketch, bin_of
from hvd_dls.core.jit import HAVE_NUMBA

if HAVE_NUMBA:
    from hvd_dls.core.selection import passes_numba as _backend
else:
    from hvd_dls.core.selection import passes_numpy as _backend  # type: ignore[no-redef]


class Found(NamedTuple):
    """What a layer sends in a step."""

    indices: np.ndarray  # (k,) uint32, ascending
    values: np.ndarray  # (k,) of the residual's dtype: residual + gradient there
    threshold: float  # smallest magnitude among the values
    sketch: Sketch  # counts around the threshold: those sent exactly, the others from a sample


def find(
    residual: np.ndarray,
    gradient: np.ndarray,
    k: int,
    last_threshold: float = 0.0,
) -> Found | None:
    """Finds the k entries of largest magnitude of residual + gradient; changes nothing.

    Exact and deterministic, ties to the lower index: ``last_threshold`` changes the speed, never
    the result.

    Args:
        residual: (n,) float32 or float64, contiguous.
        gradient: (n,) of the same dtype, contiguous; to a float32 residual also float16, or
            bfloat16 as its bits in uint16.
        k: 1 <= k <= n < 2**32.
        last_threshold: of this layer's last step, 0 if unknown.

    Returns:
        What to send; None if the gradient or the sum holds NaN or Inf (the sum may overflow).
    """
    _check(residual, gradient)
    assert 1 <= k <= len(residual)
    found = _backend.find(residual, gradient, k, float(last_threshold))
    return None if found is None else Found(*found)


def nothing_found(found: Found) -> Found:
    """The same with no entries: of a layer that sends none, but was finite."""
    return Found(found.indices[:0], found.values[:0], 0.0, found.sketch)


def found_on_device(
    indices: np.ndarray, values: np.ndarray, unsent: np.ndarray, stride: int
) -> Found | None:
    """``find``'s result, of what a device that made the pass has copied to the host.

    Args:
        indices: (k,) as in ``Found``.
        values: (k,) as in ``Found``; of a layer that is not finite, one of them is not.
        unsent: (WINDOW,) numbers of every stride-th entry's magnitude in the sketch's bins, but of
            those that are sent.
        stride: see ``passes_numpy.sample_stride``.

    Returns:
        As ``find``.
    """
    magnitudes = np.abs(values)
    if not np.isfinite(magnitudes).all():
        return None
    base = min(max(int(bin_of(magnitudes.min())) - BELOW, 0), LAST_BASE)
    counts = stride * unsent.astype(np.int64)
    if base == 0:
        counts[0] = 0  # zeros, which nobody sends
    bins = np.minimum(bin_of(magnitudes) - base, WINDOW - 1)
    counts += np.bincount(bins, minlength=WINDOW)
    return Found(indices, values, float(magnitudes.min()), Sketch(base, counts.astype(np.uint32)))


def settle(
    residual: np.ndarray,
    gradient: np.ndarray,
    indices: np.ndarray,
    kept: np.ndarray | None,
    received: Sequence[tuple[np.ndarray, np.ndarray]],
    scale: float,
    out: np.ndarray,
) -> None:
    """Books a step: the residual takes the gradient in and what was sent leaves it; ranks add up.

    Args:
        residual: (n,) as in ``find``; becomes residual + gradient, and ``kept`` where sent.
        gradient: (n,) as in ``find``.
        indices: (k,) uint32, ascending: what this rank sent.
        kept: (k,) of the residual's dtype, what stays there of it (what rounding took from the
            values sent); None: zeros.
        received: of each rank, in rank order, (indices uint32 ascending, values of the residual's
            dtype).
        scale: multiplies the sum; rounded to the residual's dtype first.
        out: (n,) float32, float64, float16, or bfloat16 bits in uint16; may be the gradient.
            Becomes scale * sum over ranks, added in rank order from +0 in the residual's dtype and
            rounded to nearest, ties to even, once; +0 where no rank sent anything.

    Raises:
        ValueError: indices that do not ascend, or lie outside the layer.  Memory outside the arrays
            is never touched, but residual and out are spoiled then.
    """
    _check(residual, gradient)
    assert out.shape == residual.shape
    assert out.flags.c_contiguous
    assert kept is None or kept.dtype == residual.dtype
    _backend.settle(residual, gradient, indices, kept, received, float(scale), out)


def sum_up(
    received: Sequence[tuple[np.ndarray, np.ndarray]],
    scale: float,
    out: np.ndarray,
    dtype: np.dtype,
) -> None:
    """Writes the sum over ranks, as ``settle``: of a layer whose residual is not on this rank.

    Args:
        received: as for ``settle``.
        scale: as for ``settle``.
        out: as for ``settle``.
        dtype: of the values received.

    Raises:
        ValueError: as ``settle``; out is spoiled then.
    """
    assert out.ndim == 1
    assert out.flags.c_contiguous
    _backend.sum_up(received, float(scale), out, np.dtype(dtype))


def finite(values: np.ndarray) -> bool:
    """Whether there is neither NaN nor Inf.

    Args:
        values: (n,) contiguous: float32, float64, float16, or bfloat16 as its bits in uint16.
    """
    return bool(_backend.finite(values))


def reaching(values: np.ndarray, least: float) -> np.ndarray:
    """Places of all magnitudes of ``least`` or more, and of what is not finite.

    Args:
        values: (n,) float32 or float64, contiguous.
        least: > 0; rounded to the values' dtype first.

    Returns:
        (m,) int64, ascending.
    """
    return _backend.reaching(values, values.dtype.type(least))


def fill(out: np.ndarray, value: float) -> None:
    """Writes zero or Inf everywhere, of a step that counts for nothing."""
    out[:] = (0x7F80 if value else 0) if out.dtype == np.uint16 else value


def _check(residual: np.ndarray, gradient: np.ndarray) -> None:
    assert residual.ndim == 1
    assert residual.shape == gradient.shape
    assert residual.flags.c_contiguous
    assert gradient.flags.c_contiguous
