"""The package's passes on a device, in their three ways.

``hvd_dls.torch`` needs Horovod, its passes on a device do not; so where Horovod is not installed
they are imported without the rest.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

import hvd_dls

OPERATIONS, KERNELS = "torch operations", "fused kernels"
TOGETHER = "fused kernels of many layers"  # launched for all layers that are there

# Makes a backend, which keeps what it has learnt of one layer.
Make = Callable[[], Any]


class Ways(NamedTuple):
    """How a device can make the passes.

    Attributes:
        makers: of backends, by way.
        notes: why a way is missing, by way.
    """

    makers: dict[str, Make]
    notes: dict[str, str]


def on_device() -> Any:
    """Imports ``hvd_dls.torch.on_device``."""
    package = "hvd_dls.torch"
    if package not in sys.modules and importlib.util.find_spec("horovod") is None:
        # Its __init__ puts hooks around Horovod's optimizer: an empty package takes its place.
        stand_in = ModuleType(package)
        stand_in.__path__ = [str(Path(path) / "torch") for path in hvd_dls.__path__]
        sys.modules[package] = stand_in
    return importlib.import_module(f"{package}.on_device")


def chooses_kernels() -> bool:
    """Whether this version of the package has fused kernels to choose."""
    return "kernels" in inspect.signature(on_device().Device).parameters


def maker(device: torch.device, kernels: bool, together: Any = None) -> Make:
    """Makes a function that makes a backend.

    Args:
        device: where arrays are.
        kernels: whether it must take the fused kernels; else it takes torch's operations.
        together: what the backends share, if kernels are launched for all of them; else None.
    """
    make = on_device().Device
    if together is not None:
        return lambda: make(device, kernels=kernels, together=together)
    if chooses_kernels():
        return lambda: make(device, kernels=kernels)
    return lambda: make(device)


def ways(device: torch.device) -> Ways:
    """Finds out in which ways a device can make the passes, by trying them."""
    found = Ways({OPERATIONS: maker(device, kernels=False)}, {})
    if not chooses_kernels():
        found.notes[KERNELS] = "this version of hvd_dls has none"
        return found
    make = maker(device, kernels=True)
    try:
        for size in (4096, 1 << 19):  # small layers may have kernels of their own
            _try(make(), torch.arange(float(size), device=device))
    except Exception as error:  # whatever a compiler of kernels may raise
        found.notes[KERNELS] = f"do not run here: {type(error).__name__}: {error}"
        return found
    found.makers[KERNELS] = make
    from hvd_dls.torch.kernels.together import Together, runs

    if runs(device, torch.float32, torch.float32):
        found.makers[TOGETHER] = maker(device, True, Together())
    else:
        found.notes[TOGETHER] = "do not run here: the log says why"
    return found


def _try(backend: Any, gradient: torch.Tensor) -> None:
    """Does two steps: kernels may need the threshold of a step before."""
    residual, last = torch.zeros_like(gradient), 0.0
    for _ in range(2):
        found = backend.find(residual, gradient, 10, last).result()
        sent, last = found.indices, found.threshold
        backend.settle(
            residual, gradient, sent, None, [(sent, found.values)], 1.0, torch.empty_like(gradient)
        )
    residual.sum().item()  # what failed on the device is told when it is waited for


def count_searches(backend: Any) -> Callable[[], int] | None:
    """Counts how often a backend searches with torch's operations from now on.

    The kernels search above a bound that they guess; where it was no good, torch's operations
    search again when the result is asked for.

    Returns:
        Tells how often; None if this version has no such thing.
    """
    search = getattr(backend, "_find", None)
    if search is None:
        return None
    count = 0

    def counted(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        return search(*arguments)

    backend._find = counted
    return lambda: count
