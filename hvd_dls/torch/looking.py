"""Whether gradients that go dense are finite: of many on a device the host is told at once."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hvd_dls.core.selection.backend import Future
from hvd_dls.torch.futures import DeviceFuture, stream_of

_AT_ONCE = 128  # gradients that the host is told of in one copy, at most

_WIDE = {torch.float64: torch.float64}  # what a magnitude is told in, if not in float32
Key = tuple[torch.device, torch.dtype, Any]


class Looks:
    """Looks at gradients, each when it comes in, without waiting for the device.

    Each has to be looked at before Horovod has it, which reduces it where it is.  That is one
    operation, which leaves the gradient's largest magnitude on the device.  What they have left is
    copied to the host when one of them is asked for: when the bucket that tells of it is complete.
    """

    def __init__(self) -> None:
        self._open: dict[Key, _Batch] = {}

    def look(self, gradient: Tensor) -> bool | Future[bool]:
        """Whether a gradient is free of NaN and Inf."""
        values = gradient.detach()
        if not values.numel():
            return True  # it has no largest entry
        dtype = _WIDE.get(values.dtype, torch.float32)
        key = values.device, dtype, stream_of(values)
        batch = self._open.get(key)
        if batch is None or not batch.takes_more:
            batch = self._open[key] = _Batch(*key)
        return _Look(batch, batch.add(values))


class _Batch:
    """Largest magnitudes of some gradients, NaN if one is: all of one stream's."""

    def __init__(self, device: torch.device, dtype: torch.dtype, stream: Any) -> None:
        self._dtype, self._stream = dtype, stream
        self._largest = torch.empty(_AT_ONCE, dtype=dtype, device=device)
        self._places = self._largest.unbind()
        self._count = 0
        self._copied: DeviceFuture[np.ndarray] | None = None

    @property
    def takes_more(self) -> bool:
        return self._copied is None and self._count < _AT_ONCE

    def add(self, values: Tensor) -> int:
        """Has the device look; returns the place of the result."""
        place = self._count
        into = self._places[place]
        torch.linalg.vector_norm(values, math.inf, dtype=self._dtype, out=into)
        self._count += 1
        return place

    def copied(self) -> DeviceFuture[np.ndarray]:
        """What the device left; no more comes to it."""
        if self._copied is None:
            with torch.cuda.stream(self._stream):  # behind what it is of
                self._copied = DeviceFuture(self._largest[: self._count], lambda array: array)
        return self._copied


class _Look(Future[bool]):
    """Of one gradient of a batch."""

    def __init__(self, batch: _Batch, place: int) -> None:
        self._batch, self._place = batch, place

    def ready(self) -> bool:
        """See ``Future``."""
        return self._batch.copied().ready()

    def result(self) -> bool:
        """See ``Future``."""
        return bool(np.isfinite(self._batch.copied().result()[self._place]))
