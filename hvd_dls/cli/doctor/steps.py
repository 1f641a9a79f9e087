"""What is tried, one step after the other, in a process that may crash or hang.

Each step tells on standard output what it found, a line of JSON, before the next one begins: so the
last line says how far the process came.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import json
import logging
import os
import resource
import sys
from collections.abc import Callable
from importlib import metadata
from typing import Any, TextIO

Facts = dict[str, Any]
# Threads of Horovod's and of frameworks are not waited for at the end.
_EXIT_AT_ONCE = os._exit


def _numpy() -> Facts:
    import numpy as np

    float(np.ones(3).sum())
    return {"version": np.__version__}


def _numba() -> Facts:
    import numba

    llvmlite = importlib.import_module("llvmlite")
    return {"version": numba.__version__, "llvmlite": llvmlite.__version__}


def _loops() -> Facts:
    """Finds entries with the loops that trainings use, compiling them where they are not kept."""
    import numpy as np

    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("hvd_dls").addHandler(handler)
    from hvd_dls.core import jit
    from hvd_dls.core.selection import passes

    gradient = np.arange(4096, dtype=np.float32)
    found = passes.find(np.zeros_like(gradient), gradient, 4, 0.0)
    assert found is not None
    assert found.indices.tolist() == [4092, 4093, 4094, 4095]
    kept = None
    if jit.HAVE_NUMBA:
        with contextlib.suppress(ImportError):
            from hvd_dls.core.compile_cache import kept_in

            kept = kept_in()
    return {"compiled": jit.HAVE_NUMBA, "kept_in": str(kept) if kept else None, "said": said}


def _horovod() -> Facts:
    import horovod

    file = os.path.join(os.path.dirname(horovod.__file__), "metadata.json")
    built_for: Facts = {}
    with contextlib.suppress(OSError, ValueError), open(file, encoding="utf-8") as opened:
        built_for = json.load(opened)
    names = {"torch": "pytorch", "tensorflow": "tensorflow"}
    return {
        "version": horovod.__version__,
        "built_for": {ours: built_for[name] for ours, name in names.items() if name in built_for},
    }


def _torch() -> Facts:
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    facts: Facts = {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "gpus": [torch.cuda.get_device_name(number) for number in range(gpus)],
    }
    with contextlib.suppress(metadata.PackageNotFoundError):
        facts["triton"] = metadata.version("triton")
    return facts


def _tensorflow() -> Facts:
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    build = tf.sysconfig.get_build_info()
    return {
        "version": tf.__version__,
        "cuda": build.get("cuda_version"),
        "gpus": [gpu.name.rpartition("physical_device:")[2] for gpu in gpus],
    }


def _keras() -> Facts:
    import keras

    return {"version": keras.__version__, "backend": keras.backend.backend()}


def _module(name: str) -> Callable[[], Facts]:
    def imports() -> Facts:
        version = getattr(importlib.import_module(name), "__version__", None)
        return {"version": version} if version else {}

    return imports


def _horovod_for(framework: str) -> Callable[[], Facts]:
    def looks() -> Facts:
        hvd = importlib.import_module(f"horovod.{framework}")
        parts = ("gloo", "mpi", "nccl", "cuda", "rocm", "ccl", "ddl")
        return {part: bool(getattr(hvd, f"{part}_built")()) for part in parts}

    return looks


def _starts(framework: str) -> Callable[[], Facts]:
    """Horovod starts with this process as its only rank and adds something up."""

    def starts() -> Facts:
        hvd = importlib.import_module(f"horovod.{framework}")
        tensors = importlib.import_module(framework)
        hvd.init()
        ranks = hvd.size()
        assert float(hvd.allreduce(tensors.ones(1))[0]) == 1.0
        hvd.shutdown()
        return {"ranks": ranks}

    return starts


Step = tuple[str, Callable[[], Facts]]
# What comes first is needed by what follows, but where ``main`` says otherwise.
PROBES: dict[str, tuple[Step, ...]] = {
    "core": (("numpy", _numpy), ("numba", _numba), ("loops", _loops), ("horovod", _horovod)),
    "torch": (
        ("torch", _torch),
        ("horovod.torch", _horovod_for("torch")),
        ("hvd_dls.torch", _module("hvd_dls.torch")),
        ("start torch", _starts("torch")),
    ),
    "tensorflow": (
        ("tensorflow", _tensorflow),
        ("horovod.tensorflow", _horovod_for("tensorflow")),
        ("hvd_dls.tensorflow", _module("hvd_dls.tensorflow")),
        ("start tensorflow", _starts("tensorflow")),
        ("keras", _keras),
        ("hvd_dls.keras", _module("hvd_dls.keras")),
    ),
    "tf_keras": (
        ("tf_keras", _module("tf_keras")),
        ("horovod.tensorflow.keras", _module("horovod.tensorflow.keras")),
    ),
}
# Steps that need not the one before.
_APART = {"numba", "loops", "horovod", "keras"}


def main(probe: str) -> None:
    """Makes the steps of a probe and ends the process."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    faulthandler.enable(all_threads=False)
    results = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what frameworks print is not a result
    failed = False
    for name, step in PROBES[probe]:
        if failed and name not in _APART:
            continue
        facts = _outcome(name, step)
        failed = facts["status"] != "works"
        _tell(results, name, facts)
    results.close()
    sys.stderr.flush()
    _EXIT_AT_ONCE(0)


def _outcome(name: str, step: Callable[[], Facts]) -> Facts:
    try:
        return {"status": "works", **step()}
    except ModuleNotFoundError as error:
        missing = error.name or ""
        # The module itself, or the package that it is in: then it is not installed, and not broken.
        absent = missing and (name == missing or name.startswith(f"{missing}."))
        status = "missing" if absent else "broken"
        return {"status": status, "error": f"{error}", "needs": missing}
    except BaseException as error:  # some modules end the process
        return {"status": "broken", "error": f"{type(error).__name__}: {error}"}


def _tell(results: TextIO, name: str, facts: Facts) -> None:
    print(json.dumps({"step": name, **facts}), file=results, flush=True)
