"""Horovod jobs that run a module of this package and leave figures, here or on hosts."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.common.paths import ROOT

LAUNCHER = str(Path(sys.executable).with_name("horovodrun"))
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "PYTHONPATH": str(ROOT),
    "PYTHONUNBUFFERED": "1",
    # Many methods' tensors, each named in its own way, would push each other out.
    "HOROVOD_CACHE_CAPACITY": "8192",
}

_PROGRESS = re.compile(r"PROGRESS (\d+)/(\d+) (.*)")


class JobError(RuntimeError):
    """A job ended with an error; the message is what it printed."""


def launcher(ranks: int, *options: str) -> list[str]:
    """Returns the command that starts a job, to be followed by the program.

    Args:
        ranks: number of processes.
        *options: more of horovodrun's own.
    """
    return [LAUNCHER, "-np", str(ranks), "--gloo", *options]


def run_job(
    command: Sequence[str],
    module: str,
    options: Sequence[str],
    popen: Callable[..., subprocess.Popen[str]] | None = None,
    environment: dict[str, str] | None = None,
    title: str = "",
) -> dict[str, Any]:
    """Runs a module on some ranks, with a progress bar.

    Args:
        command: what ``launcher`` returned.
        module: takes an option --json, to which rank 0 writes figures, and may print lines
            "PROGRESS done/total what".
        options: of the module, without --json.
        popen: what starts the launcher, with the arguments of ``subprocess.Popen``, but that
            ``env`` adds to this process's environment, as ``Host.popen``; None: here.
        environment: more environment variables for the job.
        title: of the progress bar.

    Returns:
        The figures.

    Raises:
        JobError: a rank ended with an error.
    """
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder) / "figures.json"
        job = (popen or _popen_here)(
            [*command, sys.executable, "-m", module, *options, "--json", str(figures)],
            env={**ENVIRONMENT, **(environment or {})},
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        try:
            output = _follow(job, title)
        finally:
            if job.poll() is None:
                job.terminate()
            job.wait()
        if job.returncode or not figures.exists():
            raise JobError(f"{title}: the job ended with {job.returncode}:\n{output[-5000:]}")
        result: dict[str, Any] = json.loads(figures.read_text())
        return result


def _popen_here(command: Sequence[str], **options: Any) -> subprocess.Popen[str]:
    """Starts a command on this machine."""
    options["env"] = {**os.environ, **options["env"]}
    return subprocess.Popen(command, **options)


def _follow(job: subprocess.Popen[str], title: str) -> str:
    """Shows a job's progress to its end; returns what else it printed."""
    output = []
    with tqdm(desc=title, total=None, leave=False, dynamic_ncols=True) as bar:
        for line in job.stdout or ():
            if found := _PROGRESS.search(line):
                bar.total = int(found[2])
                bar.n = int(found[1])
                bar.set_postfix_str(found[3])
            else:
                output.append(line)
    return "".join(output)
