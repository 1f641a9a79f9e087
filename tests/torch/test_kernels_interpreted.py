"""Runs the tests of the fused kernels on the CPU: where Triton interprets, and compiles, them."""

import os
import subprocess
import sys
from importlib import metadata

import pytest

from tests.jobs import ROOT, needs

pytestmark = needs("torch", "horovod", "triton")


def too_old():
    """Triton's interpreter does not go with NumPy >= 2.4 before Triton 3.7."""
    try:
        version = metadata.version("triton")
    except metadata.PackageNotFoundError:
        return True
    return tuple(map(int, version.split(".")[:2])) < (3, 7)


@pytest.mark.skipif(too_old(), reason="Triton's interpreter is too old for NumPy >= 2.4")
def test_kernels_on_the_cpu():
    check("tests/torch/kernels", "1")


@pytest.mark.skipif(too_old(), reason="as above")
def test_kernels_compile_for_cards_that_are_not_here():
    check("tests/torch/kernels/test_compiling.py", "0")


def check(tests, interpret):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", tests],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": interpret, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
