"""Runs real horovodrun jobs and turns a failing or hanging rank into a failing test."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parent.parent


def controller() -> str:
    """What carries the jobs: HVD_DLS_TEST_CONTROLLER, gloo or mpi."""
    name = os.environ.get("HVD_DLS_TEST_CONTROLLER", "gloo")
    if name not in ("gloo", "mpi"):
        raise ValueError(f"HVD_DLS_TEST_CONTROLLER is gloo or mpi, not {name!r}")
    return name


def needs(*frameworks: str) -> pytest.MarkDecorator:
    """Skips tests, with the reason, where a framework is not installed; imports none."""
    missing = [name for name in frameworks if not importlib.util.find_spec(name)]
    return pytest.mark.skipif(bool(missing), reason=f"{' and '.join(missing)} not installed")


def horovodrun(
    ranks: int, command: list[str], time_limit: float = 120, env: dict[str, str] | None = None
) -> str:
    """Runs ``command`` on ``ranks`` processes of this machine.

    Args:
        ranks: number of processes.
        command: arguments of the Python interpreter.
        time_limit: seconds after which every process of the job is killed.
        env: environment variables besides this process's own.

    Returns:
        What the job printed, each line with its rank.

    Fails the test, showing that output, if a rank exits with an error or the time is up.
    """
    launcher = Path(sys.executable).with_name("horovodrun")
    job = subprocess.Popen(
        [str(launcher), "-np", str(ranks), f"--{controller()}", sys.executable, *command],
        cwd=ROOT,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "HOROVOD_DYNAMIC_PROCESS_SETS": "1",
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "PYTHONPATH": str(ROOT),
            "HVD_DLS_TEST_RANKS": str(ranks),  # known before hvd.init(), with either controller
            **(env or {}),
        },
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = job.communicate(timeout=time_limit)
    except subprocess.TimeoutExpired:
        _kill_with_children(job.pid)
        output, _ = job.communicate()
        pytest.fail(f"{ranks} ranks still ran after {time_limit} s:\n{output}", pytrace=False)
    if job.returncode:
        pytest.fail(f"job of {ranks} ranks ended with {job.returncode}:\n{output}", pytrace=False)
    return output


def pytest_on_ranks(
    ranks: int, *paths: str, time_limit: float = 280, env: dict[str, str] | None = None
) -> str:
    """Runs test files with pytest on every rank at once; the first failure ends the job."""
    options = ["-x", "-q", "--color=no", "-p", "no:cacheprovider"]
    return horovodrun(ranks, ["-m", "pytest", *options, *paths], time_limit, env)


def _kill_with_children(pid: int) -> None:
    processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
