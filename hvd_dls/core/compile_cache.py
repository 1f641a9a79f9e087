"""Compiled loops kept on disk, under a key that covers all of the package.

numba's own cache (``cache=True``) sees changes in the file of a function only, but compiles into it
what it calls in other files: after an upgrade or an edit, processes with fresh caches and with old
ones would run different loops.  Two processes that compile a function for different dtypes at the
same time may moreover leave an index that takes the code for one for that for the other.  And
decorating fails where no directory can be written to.

Here each compiled signature is a file of its own, and what cannot be kept is compiled in memory.
Of numba's internals this needs a dispatcher's ``_cache`` and the two halves of ``CompileResult``'s
serialization, the same in all versions since 0.59.  If they are missing or fail, nothing is kept.
"""

from __future__ import annotations

import hashlib
import logging
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba.core.caching import NullCache
from numba.core.compiler import CompileResult
from numba.core.serialize import dumps

from hvd_dls.core.disk_cache import PACKAGE, DiskCache, digest

_log = logging.getLogger("hvd_dls")


def keep_on_disk(dispatcher: Any) -> None:
    """Lets a function that numba compiles use what earlier processes compiled, and keep it."""
    if _disk is None:
        return
    if hasattr(dispatcher, "_cache"):
        dispatcher._cache = _LoopCache(dispatcher.py_func, _disk)
    else:
        _give_up(f"numba {numba.__version__} has no place for a cache")


def kept_in() -> Path | None:
    """The directory that has compiled loops of this package's sources; None if none has."""
    return None if _disk is None else _disk.place()


class _LoopCache(NullCache):
    """What a dispatcher asks before it compiles, and tells afterwards, for one function."""

    def __init__(self, function: Callable[..., Any], disk: DiskCache) -> None:
        assert function.__closure__ is None, "a closure's variables are not part of the key"
        self._name = f"{function.__module__}.{function.__qualname__}"
        # The sources may have changed between the moment they were loaded and that of the digest.
        self._code = function.__code__.co_code
        self._disk = disk

    def load_overload(self, signature: Any, context: Any) -> Any:
        """The compiled function for a signature; None if it is not on disk."""
        try:
            context.refresh()
            key = self._key(signature, context.codegen())
            content = self._disk.read(self._file(key))
            if content is None:
                return None
            found, reduced = pickle.loads(content)
            return CompileResult._rebuild(context, *reduced) if found == key else None
        except Exception as error:
            _give_up(f"{type(error).__name__} while loading {self._name}: {error}")
            return None

    def save_overload(self, signature: Any, compiled: Any) -> None:
        """Keeps the compiled function for a signature, if it can be kept."""
        try:
            if compiled.lifted or compiled.library.has_dynamic_globals:
                return  # refers to this process's memory
            key = self._key(signature, compiled.codegen)
            kept = self._disk.write(self._file(key), dumps((key, compiled._reduce())))
        except Exception as error:
            _give_up(f"{type(error).__name__} while saving {self._name}: {error}")
        else:
            if not kept:
                _give_up("no directory can be written to; NUMBA_CACHE_DIR may name one")

    def _key(self, signature: Any, codegen: Any) -> tuple[Any, ...]:
        """All that the machine code depends on, besides the sources."""
        return self._name, self._code, signature, codegen.magic_tuple()

    def _file(self, key: tuple[Any, ...]) -> str:
        return f"{self._name}-{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}"


def _give_up(reason: str) -> None:
    """Says once a process that, and why, it compiles what later ones will compile again."""
    global _said
    if not _said:
        _said = True
        _log.warning(
            "compiled loops are not kept on disk, so each process compiles them anew, which takes "
            "it some seconds: %s",
            reason,
        )


def _open() -> DiskCache | None:
    settings: Any = numba.config
    versions = (numba.__version__, llvmlite.__version__, str(sys.implementation.cache_tag))
    try:
        return DiskCache(digest(PACKAGE, *versions), settings.CACHE_DIR)
    except OSError as error:
        _give_up(str(error))
        return None


_said = False
# Now, not when the first loop is compiled: somebody may have edited the sources until then.
_disk = _open()
