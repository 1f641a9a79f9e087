"""Where a layer's residual and velocity live, and what a session asks of that backend.

On the host they are NumPy arrays.  A framework's binding may keep those of some layers on another
device: then their gradients never come to the host, only what is sent.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from hvd_dls.config import DLSConfig
from hvd_dls.core.balancing.sketch import histogram
from hvd_dls.core.selection import passes
from hvd_dls.core.selection.adam import Factors, Moments, update_of
from hvd_dls.core.selection.momentum import correct
from hvd_dls.core.selection.norms import Norm, l2_norm
from hvd_dls.core.selection.passes import Found

# (n,) of a layer: gradient, residual or velocity, as its backend has them.
Array = Any
T = TypeVar("T")


class Future(ABC, Generic[T]):
    """A result that a device is still working on."""

    @abstractmethod
    def ready(self) -> bool:
        """Whether ``result`` would return at once."""

    @abstractmethod
    def result(self) -> T:
        """The result, on the host; waits for it."""


class Backend(Protocol):
    """The passes over a layer, where its arrays are: see the functions that ``Host`` names."""

    def zeros(self, size: int, dtype: np.dtype) -> Array:
        """A new residual or velocity."""

    def load(self, array: Array, saved: Any) -> None:
        """Overwrites a residual or velocity with what was saved."""

    def scale(self, array: Array, factor: float) -> None:
        """Multiplies a residual or velocity."""

    def copy(self, array: Array) -> Array:
        """The same values in memory of their own."""

    def to_host(self, array: Array) -> np.ndarray:
        """A residual, to be looked at."""

    def correct(
        self,
        gradient: Array,
        velocity: Array | None,
        into: Array,
        config: DLSConfig,
        loss_scale: float,
        norm: Norm | None,
    ) -> Array:
        """``momentum.correct``."""

    def update(
        self,
        gradient: Array,
        before: Moments,
        into: Moments,
        update: Array,
        factors: Factors,
        config: DLSConfig,
        loss_scale: float,
        norm: Norm | None,
    ) -> None:
        """``adam.update_of``."""

    def norm(self, gradient: Array, limit: float | None) -> Any:
        """``norms.l2_norm``; of a gradient on a device, a number there that ``float`` waits for."""

    def clear(self, array: Array, indices: np.ndarray) -> None:
        """Writes zeros at (k,) uint32 indices, unique."""

    def find(
        self, residual: Array, gradient: Array, k: int, last_threshold: float
    ) -> Found | Future[Found | None] | None:
        """``passes.find``; or its result later, without waiting for a device."""

    def settle(
        self,
        residual: Array,
        gradient: Array,
        indices: np.ndarray,
        kept: np.ndarray | None,
        received: Sequence[tuple[np.ndarray, np.ndarray]],
        scale: float,
        out: Array,
    ) -> None:
        """``passes.settle``, perhaps only in ``finish``; indices are known to be good."""

    def finish(self) -> None:
        """Does what ``settle`` has put off, of all layers that have it put off together."""

    def sum_up(
        self,
        received: Sequence[tuple[np.ndarray, np.ndarray]],
        scale: float,
        out: Array,
        dtype: np.dtype,
    ) -> None:
        """``passes.sum_up``; indices are known to be good."""

    def fill(self, out: Array, value: float) -> None:
        """``passes.fill``."""

    def add(self, array: Array, other: Array) -> None:
        """Adds another array, in place."""

    def finite(self, array: Array) -> bool:
        """``passes.finite``."""

    def histogram(self, array: Array) -> np.ndarray:
        """``plan.histogram``."""


class Host:
    """The host: NumPy arrays."""

    correct = staticmethod(correct)
    update = staticmethod(update_of)
    norm = staticmethod(l2_norm)
    find = staticmethod(passes.find)
    settle = staticmethod(passes.settle)
    sum_up = staticmethod(passes.sum_up)
    finite = staticmethod(passes.finite)
    fill = staticmethod(passes.fill)
    histogram = staticmethod(histogram)

    def finish(self) -> None:
        pass

    def zeros(self, size: int, dtype: np.dtype) -> np.ndarray:
        return np.zeros(size, dtype)

    def load(self, array: np.ndarray, saved: Any) -> None:
        array[:] = np.asarray(saved)

    def scale(self, array: np.ndarray, factor: float) -> None:
        array *= factor

    def add(self, array: np.ndarray, other: np.ndarray) -> None:
        array += other

    def copy(self, array: np.ndarray) -> np.ndarray:
        return array.copy()

    def to_host(self, array: np.ndarray) -> np.ndarray:
        return array

    def clear(self, array: np.ndarray, indices: np.ndarray) -> None:
        array[indices] = 0


HOST: Backend = Host()
