"""Runs jobs across the hosts that benchmarks/hosts makes, and reads what their ranks report."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.hosts import Hosts, why_not
from tests.jobs import ROOT

HERE = Path(__file__).parent
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": str(ROOT)}

needs_hosts = pytest.mark.skipif(
    why_not() is not None, reason=f"no hosts can be made here: {why_not()}"
)


def horovodrun(
    hosts: Hosts,
    controller: str,
    per_host: Sequence[int],
    program: str,
    folder: Path,
    *options: str,
) -> list[str]:
    """The command that runs a program of this folder, which leaves its reports in ``folder``.

    Args:
        hosts: on which it will run.
        controller: "gloo" or "mpi".
        per_host: number of ranks for each host.
        program: name of the file; ``folder`` is its argument.
        folder: an empty one, the same for all hosts.
        options: more of horovodrun's own.

    Skips the test if it needs MPI and there is no mpirun.
    """
    if controller == "mpi" and not shutil.which("mpirun"):
        pytest.skip("mpirun is not installed")
    launch = ["horovodrun", f"--{controller}", "-np", str(sum(per_host))]
    launch += [*hosts.horovodrun_options(per_host), *options]
    return [*launch, sys.executable, str(HERE / program), str(folder)]


def skip_without_mpi(output: str) -> None:
    """Skips the test if this is what horovodrun says where Horovod was built without MPI."""
    if "MPI support has not been built" in output:
        pytest.skip("this Horovod has no MPI")


def run(hosts: Hosts, command: list[str], folder: Path, time_limit: float) -> list[dict[str, Any]]:
    """Runs a job to its end.

    Returns:
        Each rank's report, by rank.

    Fails the test, showing what the job printed, if a rank exits with an error or the time is up;
    then whatever runs on any host is killed.
    """
    try:
        job = hosts.run(command, time_limit, cwd=ROOT, env=ENVIRONMENT)
    except subprocess.TimeoutExpired as error:
        done = [report["rank"] for report in reports(folder)]
        message = f"still ran after {time_limit} s (ranks {done} were done):\n{error.output}"
        pytest.fail(message, pytrace=False)
    skip_without_mpi(job.stdout)
    if job.returncode:
        pytest.fail(f"the job ended with {job.returncode}:\n{job.stdout}", pytrace=False)
    return reports(folder)


def reports(folder: Path) -> list[dict[str, Any]]:
    """What ranks have reported so far, by rank."""
    read = [json.loads(file.read_text()) for file in folder.glob("*.json")]
    return sorted(read, key=lambda report: report["rank"])
