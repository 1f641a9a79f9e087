"""Compiled loops where numba works; NumPy otherwise."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

_log = logging.getLogger("hvd_dls")


def _numba_works() -> bool:
    """Whether loops can be compiled; if not, the log says why.

    numba is optional, so whatever goes wrong in it is no reason to fail.
    """
    try:
        import numba

        settings: Any = numba.config
        if not settings.DISABLE_JIT:
            return True
        reason = "numba is told not to compile (NUMBA_DISABLE_JIT)"
    except ModuleNotFoundError as error:
        if error.name == "numba":
            reason = "numba is not installed (pip install numba)"
        else:
            reason = f"numba is installed, but importing it failed ({error})"
    except Exception as error:  # it asks for another NumPy, a library is missing, ...
        reason = f"numba is installed, but importing it failed ({type(error).__name__}: {error})"
    _log.warning("compression takes several times as long as with compiled loops: %s", reason)
    return False


def _keep_nothing(dispatcher: Any) -> None:
    """Instead of ``compile_cache.keep_on_disk``."""


def _keeper() -> Callable[[Any], None]:
    """What keeps compiled loops on disk, if it can be done with this numba."""
    try:
        from hvd_dls.core.compile_cache import keep_on_disk
    except Exception as error:  # numba's internals, which another version may have changed
        _log.warning("compiled loops are not kept on disk: %s", error)
        return _keep_nothing
    return keep_on_disk


HAVE_NUMBA = _numba_works()
_keep = _keeper() if HAVE_NUMBA else _keep_nothing


def jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles a loop at its first call, kept on disk for later processes.

    It runs without the interpreter's lock, so that other threads (Horovod's, TensorFlow's) go on.
    Without numba the function comes back as it is: it must not be called then, only defined.
    """
    if not HAVE_NUMBA:
        return function
    import numba

    compiled: Callable[..., Any] = numba.njit(nogil=True, error_model="numpy")(function)
    _keep(compiled)
    return compiled
