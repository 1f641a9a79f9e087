"""Commands run one after the other, each with a time limit; what fails or hangs ends alone."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

MARK = "HVD_DLS_GPU_PART"  # in the environment of all processes of a part, however they detach
TAIL_LINES = 40
GRACE = 5.0  # seconds for a process to end when asked to
LEAST = 5.0  # seconds below which a part is not worth starting

PASSED, FAILED, TIMED_OUT, NOT_RUN = "passed", "failed", "timed out", "not run"


@dataclass(frozen=True)
class Part:
    """One command.

    Args:
        limit: seconds after which all its processes are killed.
        needs: names of parts without whose success this one makes no sense.
        environment: variables besides this process's own.
    """

    name: str
    command: Sequence[str]
    limit: float
    needs: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Result:
    """What became of a part."""

    name: str
    command: str
    outcome: str
    seconds: float = 0.0
    status: int | None = None
    tail: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def run_all(
    parts: Sequence[Part],
    out: Path,
    cwd: Path,
    total: float,
    report: Callable[[Result], None],
    clock: Callable[[], float] = time.monotonic,
) -> list[Result]:
    """Run every part within `total` seconds; each result is reported as soon as it is there."""
    end = clock() + total
    results: dict[str, Result] = {}
    for part in parts:
        # A part that was not chosen has been run before.
        lacking = [n for n in part.needs if n in results and results[n].outcome != PASSED]
        limit = min(part.limit, end - clock())
        if lacking or limit < LEAST:
            why = f"needs {', '.join(lacking)}" if lacking else "no time left"
            result = Result(part.name, shlex.join(part.command), NOT_RUN, tail=why)
        else:
            result = run(part, out / f"{part.name}.log", cwd, limit)
        results[part.name] = result
        report(result)
    return list(results.values())


def run(part: Part, log: Path, cwd: Path, limit: float) -> Result:
    """Run one part with its output in the log. No process of it is left when this returns."""
    mark = uuid.uuid4().hex
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **part.environment, MARK: mark}
    start = time.monotonic()
    status: int | None = None
    with log.open("w") as file:
        try:
            process = subprocess.Popen(
                part.command,
                cwd=cwd,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = process.wait(limit)
            end_marked(mark)
            process.wait()
            outcome = {None: TIMED_OUT, 0: PASSED}.get(status, FAILED)
        except OSError as problem:
            file.write(f"{problem}\n")
            outcome = FAILED
    seconds = round(time.monotonic() - start, 1)
    tail = "" if outcome == PASSED else end_of(log)
    return Result(part.name, shlex.join(part.command), outcome, seconds, status, tail)


def end_of(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-TAIL_LINES:])


def end_marked(mark: str) -> None:
    """End what a part has started: asked first, since horovodrun then ends its ranks in order."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        alive = marked(mark)
        for pid in alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        until = time.monotonic() + GRACE
        while alive and (alive := marked(mark)) and time.monotonic() < until:
            time.sleep(0.1)


def marked(mark: str) -> list[int]:
    """The processes that have the mark in their environment. Those that have ended show none."""
    found = []
    entry = f"{MARK}={mark}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if entry in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found
