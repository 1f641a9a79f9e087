"""All that the command finds out, as one dictionary."""

from __future__ import annotations

import os
import platform
import sys
from typing import Any

import hvd_dls
from hvd_dls.cli.doctor.machine import machine, tools
from hvd_dls.cli.doctor.probing import probe_all, tidy

Facts = dict[str, Any]
FRAMEWORKS = ("torch", "tensorflow", "keras", "tf_keras")
# Of the environment only what changes how a training runs, and tells nobody's name.
_VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "HOROVOD_CONTROLLER",
    "HOROVOD_CPU_OPERATIONS",
    "HOROVOD_CYCLE_TIME",
    "HOROVOD_DYNAMIC_PROCESS_SETS",
    "HOROVOD_ELASTIC",
    "HOROVOD_FUSION_THRESHOLD",
    "HOROVOD_GLOO_TIMEOUT_SECONDS",
    "HOROVOD_GPU_OPERATIONS",
    "HVD_DLS_SHARED_LAUNCHES",
    "KERAS_BACKEND",
    "NUMBA_CACHE_DIR",
    "NUMBA_DISABLE_JIT",
    "OMP_NUM_THREADS",
    "TF_USE_LEGACY_KERAS",
    "TRITON_INTERPRET",
)


def gather(time_limit: float, host_name: bool) -> Facts:
    """Tries everything.

    Args:
        time_limit: seconds for each process that tries a framework.
        host_name: whether to tell the name of this host.
    """
    return {
        "format": 1,
        "hvd_dls": hvd_dls.__version__,
        "python": {
            "version": platform.python_version(),
            "implementation": platform.python_implementation(),
            "executable": tidy(sys.executable),
            "environment": sys.prefix != sys.base_prefix,
        },
        "machine": machine(host_name),
        "tools": tools(),
        "variables": {name: tidy(os.environ[name]) for name in _VARIABLES if name in os.environ},
        "steps": probe_all(time_limit),
    }
