"""The machine that figures are from."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from datetime import date
from typing import Any

import torch

import hvd_dls
from benchmarks.gpu.passes import Ways

_PACKAGES = ("torch", "triton", "numpy", "numba", "horovod")


def about(device: torch.device, quick: bool = False) -> dict[str, Any]:
    """Describes machine and versions."""
    return {
        "device": device.type,
        "card": _card(device),
        "quick": quick,
        "date": str(date.today()),
        "cores": len(os.sched_getaffinity(0)),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "hvd_dls": hvd_dls.__version__,
        "cuda": torch.version.cuda,
        **{package: _version(package) for package in _PACKAGES},
    }


def ways_found(ways: Ways) -> dict[str, Any]:
    """Tells in which ways this package runs here, and why not in others."""
    return {"ways": list(ways.makers), "missing": ways.notes}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _card(device: torch.device) -> dict[str, Any] | None:
    if device.type != "cuda":
        return None
    found = torch.cuda.get_device_properties(device)
    return {
        "name": found.name,
        "memory_gib": found.total_memory / 2**30,
        "l2_mib": getattr(found, "L2_cache_size", 0) / 2**20,
        "multiprocessors": found.multi_processor_count,
        "capability": f"{found.major}.{found.minor}",
    }
