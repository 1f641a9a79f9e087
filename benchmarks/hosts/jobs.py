"""Runs rounds.py as a job, with a progress bar, and sums its rounds up."""

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

import numpy as np
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = str(Path(sys.executable).with_name("horovodrun"))
SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "PYTHONUNBUFFERED": "1",
    # Many methods' tensors, each named in its own way, would push each other out.
    "HOROVOD_CACHE_CAPACITY": "8192",
}

_PROGRESS = re.compile(r"PROGRESS (\d+)/(\d+) (.*)")


class JobError(RuntimeError):
    """A job ended with an error; the message is what it printed."""


def run_job(
    command: Sequence[str],
    options: Sequence[str],
    popen: Callable[..., subprocess.Popen[str]] | None = None,
    settings: dict[str, str] | None = None,
    title: str = "",
) -> dict[str, Any]:
    """Runs ``rounds.py`` on some ranks; returns its figures.

    Args:
        command: what ``launcher`` returned.
        options: of rounds.py, without --json.
        popen: what starts the launcher, with the arguments of ``subprocess.Popen``, but that
            ``env`` comes on top of this process's; None: here.
        settings: more environment variables for the job.
        title: of the progress bar.

    Raises:
        JobError: a rank ended with an error.
    """
    environment = {**SETTINGS, "PYTHONPATH": str(ROOT), **(settings or {})}
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder) / "figures.json"
        program = [sys.executable, "-m", "benchmarks.rounds"]
        job = (popen or _popen_here)(
            [*command, *program, *options, "--json", str(figures)],
            env=environment,
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
    options["env"] = {**os.environ, **options["env"]}
    return subprocess.Popen(command, **options)


def _follow(job: subprocess.Popen[str], title: str) -> str:
    output = []
    with tqdm(desc=title, unit="turn", total=None, leave=False, dynamic_ncols=True) as bar:
        for line in job.stdout or ():
            if found := _PROGRESS.search(line):
                bar.total = int(found[2])
                bar.n = int(found[1])
                bar.set_postfix_str(found[3])
            else:
                output.append(line)
    return "".join(output)


def launcher(ranks: int, *options: str) -> list[str]:
    """horovodrun, with options besides."""
    return [LAUNCHER, "-np", str(ranks), "--gloo", *options]


# Summing up ---------------------------------------------------------------------------------------


def steps_of(job: dict[str, Any], method: str, what: str = "seconds") -> np.ndarray:
    """All steps of a method, in all turns."""
    return np.concatenate([turn[what] for turn in job["methods"][method]["turns"]])


def middle(values: Any) -> list[float]:
    """Lower quartile, median, upper quartile."""
    low, median, high = np.percentile(values, [25, 50, 75])
    return [float(low), float(median), float(high)]


def ratio(
    job: dict[str, Any], method: str, beside: str = "dense", without: str | None = None
) -> list[float]:
    """How many times as long a step takes with one method as with another.

    Args:
        job: what ``run_job`` returned.
        method: the one expected to be faster.
        beside: the one expected to be slower.
        without: a method whose time is subtracted from both.

    Returns:
        Smallest, median and largest over the rounds, of ratios of medians in a round.
    """

    def medians(name: str) -> np.ndarray:
        return np.array([np.median(turn["seconds"]) for turn in job["methods"][name]["turns"]])

    off = medians(without) if without else 0.0
    ratios = (medians(beside) - off) / (medians(method) - off)
    return [float(ratios.min()), float(np.median(ratios)), float(ratios.max())]


def title_of(method: str) -> str:
    """As tables and pictures call a method."""
    kind, *rest = method.split(":")
    names = {"dls": "DLS", "layerwise": "layer-wise top-k", "none": "dense"}
    words = [names.get(kind, kind)]
    words += [f"{float(rest[0]):.1%}"] if rest else []
    return ", ".join([*words, *rest[1:]])
