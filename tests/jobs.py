"""Runs real horovodrun jobs and turns a failing or hanging rank into a failing test."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parent.parent
LAUNCHER = ROOT / "tests" / "launcher.py"

# Seconds, each of them a sign of something that hangs: on a machine that is busy with other things,
# all takes ten times as long.  What is inside ends first, so that its output is seen:
CONNECTION = 600  # ranks wait so long for each other; Horovod's own limits are 30
RANK_TEST = 1200  # a test inside a job; the stacks of all threads are shown
JOB = 1800  # a job with one program
TEST_JOB = 3600  # a job that runs tests; pytest's own limit, in setup.cfg, is larger

# The jobs that a demo or benchmark starts by itself inherit these, too.
os.environ.setdefault("HOROVOD_START_TIMEOUT", str(CONNECTION))
os.environ.setdefault("HOROVOD_GLOO_TIMEOUT_SECONDS", str(CONNECTION))


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


class Job:
    """A program on several processes of this machine, started by horovodrun; for ``with``.

    Args:
        ranks: number of processes.
        command: arguments of the Python interpreter.
        env: environment variables besides this process's own.
        per_host: ranks on each of up to two hosts that this machine pretends to be.
        options: further ones of horovodrun.
    """

    def __init__(
        self,
        ranks: int,
        command: list[str],
        env: dict[str, str] | None = None,
        per_host: Sequence[int] | None = None,
        options: Sequence[str] = (),
    ) -> None:
        self._ranks = ranks
        # Not a pipe: a process that outlives the job would keep it open.
        self._output = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            [
                *(sys.executable, str(LAUNCHER), "-np", str(ranks), f"--{controller()}"),
                *(() if per_host is None else pretended(per_host)),
                *options,
                *(sys.executable, *command),
            ],
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
            stdout=self._output,
            stderr=subprocess.STDOUT,
        )

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        """Ends all processes of the job, if it still runs."""
        self._kill()
        self._output.close()

    def runs(self) -> bool:
        """Whether the job has not ended."""
        return self._process.poll() is None

    def output(self) -> str:
        """What the job has printed so far, each line with its rank."""
        size = os.fstat(self._output.fileno()).st_size
        # The processes write where this file's position is: it must not move.
        return os.pread(self._output.fileno(), size, 0).decode(errors="replace")

    def wait(self, time_limit: float) -> str:
        """Waits for the job's end.

        Args:
            time_limit: seconds after which every process of the job is killed.

        Returns:
            What the job printed.

        Fails the test, showing that output, if a rank exits with an error or the time is up.
        """
        problem = ""
        try:
            if status := self._process.wait(time_limit):
                problem = f"job of {self._ranks} ranks ended with {status}"
        except subprocess.TimeoutExpired:
            self._kill()
            problem = f"{self._ranks} ranks still ran after {time_limit} s"
        if problem:
            pytest.fail(f"{problem}:\n{self.output()}", pytrace=False)
        return self.output()

    def _kill(self) -> None:
        if not self.runs():
            return
        launcher = psutil.Process(self._process.pid)
        processes = [launcher, *launcher.children(recursive=True)]
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()


def pretended(per_host: Sequence[int]) -> list[str]:
    """horovodrun's arguments by which two names of this machine are two hosts, over Gloo."""
    slots = zip(("localhost", "127.0.0.1"), per_host, strict=False)
    hosts = ",".join(f"{name}:{ranks}" for name, ranks in slots)
    return ["-H", hosts, "--network-interface", "lo"]


def horovodrun(
    ranks: int,
    command: list[str],
    time_limit: float = JOB,
    env: dict[str, str] | None = None,
    per_host: Sequence[int] | None = None,
) -> str:
    """Runs ``command`` on ``ranks`` processes of this machine.

    Args:
        ranks: number of processes.
        command: arguments of the Python interpreter.
        time_limit: seconds after which every process of the job is killed.
        env: environment variables besides this process's own.
        per_host: see ``Job``.

    Returns:
        What the job printed, each line with its rank.

    Fails the test, showing that output, if a rank exits with an error or the time is up.
    """
    with Job(ranks, command, env, per_host) as job:
        return job.wait(time_limit)


def pytest_on_ranks(
    ranks: int,
    *paths: str,
    time_limit: float = TEST_JOB,
    env: dict[str, str] | None = None,
    per_host: Sequence[int] | None = None,
) -> str:
    """Runs test files with pytest on every rank at once; the first failure ends the job.

    So does a test that hangs: it shows the stacks of all threads.
    """
    options = ["-x", "-q", "--color=no", "-p", "no:cacheprovider"]
    options += [f"--timeout={RANK_TEST}", "--timeout-method=thread"]
    return horovodrun(ranks, ["-m", "pytest", *options, *paths], time_limit, env, per_host)
