"""Scales of pictures, and the marks on them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Scale:
    """From numbers to places in a picture.

    Attributes:
        low: the smallest number.
        high: the largest number, larger than that.
        start: the place of the smallest.
        end: the place of the largest.
        log: whether equal ratios have equal distances.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, values: np.ndarray) -> np.ndarray:
        low, high = self.low, self.high
        if self.log:
            values, low, high = np.log(values), math.log(low), math.log(high)
        return self.start + (values - low) / (high - low) * (self.end - self.start)

    def at(self, value: float) -> float:
        """The place of one number."""
        return float(self(np.array([value]))[0])

    def ticks(self, most: int = 6) -> list[float]:
        """Round numbers to mark."""
        return self._log_ticks(most) if self.log else _linear_ticks(self.low, self.high, most)

    def _log_ticks(self, most: int) -> list[float]:
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        for factors in ((1.0, 2.0, 5.0), (1.0, 3.0), (1.0,)):
            ticks = [f * 10.0**e for e in range(first, last + 1) for f in factors]
            ticks = [tick for tick in ticks if self.low * 0.999 <= tick <= self.high * 1.001]
            if len(ticks) <= most:
                break
        else:
            ticks = ticks[:: -(-len(ticks) // most)]
        return ticks if len(ticks) > 1 else _linear_ticks(self.low, self.high, most)


def _linear_ticks(low: float, high: float, most: int) -> list[float]:
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    width = next(f * power for f in (1, 2, 5, 10) if f * power >= rough)
    first = math.ceil(low / width - 1e-9)
    return [n * width for n in range(first, math.floor(high / width + 1e-9) + 1)]


def scale_of(
    arrays: Iterable[np.ndarray], start: float, end: float, log: bool = False, zero: bool = False
) -> Scale:
    """A scale with room for all numbers that can be drawn: finite ones, with ``log`` above zero.

    Args:
        arrays: of numbers.
        start: the place of the smallest.
        end: the place of the largest.
        log: see ``Scale``.
        zero: whether it begins at zero.
    """
    numbers = [array[np.isfinite(array) & ((array > 0) | (not log))] for array in arrays]
    numbers = [array for array in numbers if array.size]
    low = min((float(array.min()) for array in numbers), default=1.0 if log else 0.0)
    high = max((float(array.max()) for array in numbers), default=10.0 if log else 1.0)
    if log:
        if high < 1.05 * low:
            low, high = low / 1.5, high * 1.5
        return Scale(low / 1.08, high * 1.08, start, end, log=True)
    if zero:
        low, high = 0.0, high * 1.05
    if high <= low:
        low, high = low - 0.5, high + 0.5
    return Scale(low, high, start, end)


def number_text(value: float) -> str:
    """A number in few characters."""
    if 1000 <= abs(value) < 1e6:
        return f"{value:,.0f}"
    if value == 0 or 1e-3 <= abs(value) < 1000:
        return f"{value:.4g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
