"""Where loops cannot be compiled, NumPy does the same, and the log says why."""

import os
import subprocess
import sys

import pytest

from hvd_dls.core.jit import HAVE_NUMBA
from tests.jobs import ROOT

STEP = """
import hashlib, logging
logging.basicConfig(format="%(name)s: %(message)s")
import numpy as np
from hvd_dls.core.jit import HAVE_NUMBA
from hvd_dls.core.selection import passes
from hvd_dls.core.wire import elias_fano

residual, gradient = np.random.default_rng(0).standard_normal((2, 10_000)).astype(np.float32)
found = passes.find(residual, gradient, 100, 0.0)
out = np.empty_like(gradient)
received = [(found.indices, found.values), (found.indices[:50], found.values[:50])]
passes.settle(residual, gradient, found.indices, None, received, 0.5, out)
code = [np.zeros(n // 8, np.uint64) for n in elias_fano.lengths(10_000, 100)]
starts, offsets = np.array([0, 100]), np.array([0, 10_000])
assert elias_fano.encode(found.indices, starts, offsets, 6, *code) == elias_fano.GOOD
read = np.zeros(100, np.uint32)
assert elias_fano.decode(*code, starts, offsets, 6, read) == elias_fano.GOOD
results = (found.indices, found.values, found.sketch.counts, residual, out, *code, read)
print(HAVE_NUMBA, hashlib.sha256(b"".join(r.tobytes() for r in results)).hexdigest())
"""
ABSENT = "import sys; sys.modules['numba'] = None\n"


def step(path=ROOT, before="", **environment):
    """Whether loops were compiled; a digest of the results; the log."""
    job = subprocess.run(
        [sys.executable, "-c", before + STEP],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{path}{os.pathsep}{ROOT}", **environment},
        capture_output=True,
        text=True,
    )
    assert job.returncode == 0, job.stderr
    compiled, digest = job.stdout.split()
    return compiled == "True", digest, job.stderr


@pytest.fixture(scope="module")
def with_numpy():
    compiled, digest, log = step(before=ABSENT)
    assert not compiled
    assert "hvd_dls: compression takes several times as long" in log
    assert "numba is not installed" in log
    return digest


@pytest.mark.skipif(not HAVE_NUMBA, reason="there is no numba that works")
def test_compiled_loops_do_the_same_as_numpy_and_say_nothing(with_numpy):
    assert step() == (True, with_numpy, "")


@pytest.mark.skipif(not HAVE_NUMBA, reason="there is no numba that works")
def test_numba_that_is_told_not_to_compile(with_numpy):
    compiled, digest, log = step(NUMBA_DISABLE_JIT="1")
    assert (compiled, digest) == (False, with_numpy)
    assert "NUMBA_DISABLE_JIT" in log


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (
            "raise ImportError('Numba needs NumPy 2.4 or less. Got NumPy 2.5.')",
            "ImportError: Numba needs NumPy 2.4 or less. Got NumPy 2.5.",
        ),
        ("import no_such_llvmlite", "No module named 'no_such_llvmlite'"),
        ("raise OSError('cannot load libllvmlite.so')", "OSError: cannot load libllvmlite.so"),
        ("", "AttributeError: module 'numba' has no attribute 'config'"),
    ],
)
def test_numba_that_is_broken(tmp_path, with_numpy, source, reason):
    (tmp_path / "numba").mkdir()
    (tmp_path / "numba" / "__init__.py").write_text(source)
    compiled, digest, log = step(tmp_path)
    assert (compiled, digest) == (False, with_numpy)
    assert f"numba is installed, but importing it failed ({reason})" in log
    assert "not installed" not in log
