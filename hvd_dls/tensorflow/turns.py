"""Turns of what TensorFlow calls: one at a time, with floating-point numbers as they are elsewhere.

TensorFlow runs independent operations side by side, and has the threads that do take subnormal
numbers for zero.  Residuals would lose them, and what other threads of ours work on would have
other bits.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from types import TracebackType

# Of C's <fenv.h>: rounding, flags and, on x86 and ARM, what becomes of subnormal numbers.
_ON_LINUX = sys.platform == "linux"  # elsewhere FE_DFL_ENV is another
_save, _set = (
    getattr(ctypes.CDLL(None), name, None) if _ON_LINUX else None
    for name in ("fegetenv", "fesetenv")
)
_DEFAULT = ctypes.c_void_p(-1)  # FE_DFL_ENV of glibc and musl
_SIZE = 64  # bytes of an fenv_t, at most


class Turns:
    """A lock; whoever holds it has the C library's usual floating-point environment.

    Where it is not known how to set that, it is a lock and no more.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._before = ctypes.create_string_buffer(_SIZE)

    def __enter__(self) -> None:
        self._lock.acquire()
        if _save and _set:
            _save(self._before)
            _set(_DEFAULT)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if _save and _set:
            _set(self._before)
        self._lock.release()
