"""Results that a GPU is still working on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from hvd_dls.core.selection.backend import Future

T = TypeVar("T")


def stream_of(tensor: Tensor) -> Any:
    """The stream on which this thread gives a tensor's device work; None on a CPU."""
    return torch.cuda.current_stream(tensor.device) if tensor.is_cuda else None


class DeviceFuture(Future[T]):
    """What a device will have copied to the host.

    Args:
        copied: (m,) a result of work that the device has been given.
        read: makes of it, as an array, what is wanted.
    """

    def __init__(self, copied: Tensor, read: Callable[[np.ndarray], T]) -> None:
        self._read = read
        self._array = copied.to("cpu", non_blocking=True)  # into pinned memory, so without waiting
        self._event: Any = None
        if copied.is_cuda:
            self._event = torch.cuda.Event(blocking=True)
            self._event.record(torch.cuda.current_stream(copied.device))

    def ready(self) -> bool:
        """See ``Future``."""
        if self._event is not None and self._event.query():
            self._event = None
        return self._event is None

    def result(self) -> T:
        """See ``Future``."""
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        return self._read(self._array.numpy())
