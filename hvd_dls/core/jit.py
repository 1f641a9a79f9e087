"""Compiled loops where numba is installed; NumPy otherwise."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

try:
    import numba

    HAVE_NUMBA = True
except ImportError:  # an optional package: pip install hvd-dls[fast]
    HAVE_NUMBA = False
    logging.getLogger("hvd_dls").warning(
        "numba is not installed: compression takes several times as long (pip install numba)"
    )


def jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles a loop at its first call, kept on disk for later processes.

    It runs without the interpreter's lock, so that other threads (Horovod's, TensorFlow's) go on.
    Without numba the function comes back as it is: it must not be called then, only defined.
    """
    if not HAVE_NUMBA:
        return function
    compiled: Callable[..., Any] = numba.njit(nogil=True, cache=True, error_model="numpy")(function)
    return compiled
