"""Runs benchmarks as their users do, and says where hosts cannot be made."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from benchmarks.hosts import why_not
from tests.jobs import JOB, ROOT

PNG = b"\x89PNG"
QUICK = ["--model", "tiny", "--rounds", "2", "--turn-seconds", "0.02", "--warmup", "3"]

needs_hosts = pytest.mark.skipif(
    why_not() is not None, reason=f"no hosts can be made here: {why_not()}"
)


def run(*arguments: str) -> str:
    """Runs the Python interpreter at the root of this repository; returns what it printed."""
    job = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=JOB,
    )
    assert job.returncode == 0, job.stdout + job.stderr
    return job.stdout
