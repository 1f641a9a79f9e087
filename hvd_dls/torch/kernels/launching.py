"""Where kernels are launched."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def on(device: torch.device) -> Iterator[None]:
    """Makes this thread launch kernels on a tensor's device; a CPU's are interpreted (in tests)."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            yield
    else:
        yield
