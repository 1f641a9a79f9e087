"""A lock for the Python functions of a step, with the default floating-point environment.

TensorFlow runs independent operations in parallel, on threads that flush subnormal numbers to zero.
Residuals would lose those numbers, and so would the package's own threads if they inherited that
setting, so that results would depend on where they were computed.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from types import TracebackType

# Of <fenv.h>: rounding mode, exception flags and, on x86 and ARM, flushing of subnormal numbers.
_ON_LINUX = sys.platform == "linux"  # FE_DFL_ENV has another value elsewhere
_save, _set = (
    getattr(ctypes.CDLL(None), name, None) if _ON_LINUX else None
    for name in ("fegetenv", "fesetenv")
)
_DEFAULT = ctypes.c_void_p(-1)  # FE_DFL_ENV of glibc and musl
_SIZE = 64  # bytes of an fenv_t, at most


class StepLock:
    """A lock; while it is held, its thread has the C library's default floating-point environment.

    On platforms where that cannot be set it is a plain lock.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._saved = ctypes.create_string_buffer(_SIZE)

    def __enter__(self) -> None:
        self._lock.acquire()
        if _save and _set:
            _save(self._saved)
            _set(_DEFAULT)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if _save and _set:
            _set(self._saved)
        self._lock.release()
