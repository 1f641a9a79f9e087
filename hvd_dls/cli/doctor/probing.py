"""Tries frameworks in processes of their own, so that a crash or a hang is a result."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any

from hvd_dls.cli.doctor.steps import PROBES

Facts = dict[str, Any]
# The same modules are found as here, whatever the folder and the interpreter's options.
_CODE = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from hvd_dls.cli.doctor.steps import main
main(sys.argv[2])
"""
# A job around this process is no affair of the probes, nor are the files that it writes.
_OF_A_JOB = ("HOROVOD_", "OMPI_", "PMIX_", "PMI_", "PRTE_")
_FLAGS = {"isolated": "-I", "no_site": "-S", "ignore_environment": "-E", "no_user_site": "-s"}
_LONGEST = 600  # characters of an error


def probe_all(time_limit: float) -> dict[str, Facts]:
    """Makes all probes, some at a time.

    Args:
        time_limit: seconds for each.

    Returns:
        For each step ``{"status": ...}`` and what it found. The status is works, missing, broken
        (an error), crashed (the process ended), hung (the time was up) or "not tried".
    """
    at_a_time = min(len(PROBES), len(os.sched_getaffinity(0)))
    running: set[int] = set()
    with ThreadPoolExecutor(at_a_time) as pool:
        try:
            results = list(pool.map(lambda name: _probe(name, time_limit, running), PROBES))
        except BaseException:  # Ctrl-C: the pool waits for its threads, and they for the probes
            pool.shutdown(wait=False, cancel_futures=True)
            for pid in list(running):
                _kill(pid)
            raise
    return {step: facts for result in results for step, facts in result.items()}


def _probe(name: str, time_limit: float, running: set[int]) -> dict[str, Facts]:
    flags = [flag for field, flag in _FLAGS.items() if getattr(sys.flags, field)]
    command = [sys.executable, *flags, "-c", _CODE, json.dumps(sys.path), name]
    with tempfile.TemporaryFile() as log, tempfile.TemporaryFile() as results:
        # Files, not pipes: a process that outlives the probe would keep these open.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=results,
            stderr=log,
            env=_environment(name),
            start_new_session=True,
        )
        running.add(process.pid)
        try:
            process.wait(time_limit)
            problem = _ending(process.returncode)
        except subprocess.TimeoutExpired:
            problem = {"status": "hung", "error": f"nothing after {time_limit:g} s"}
        finally:
            _kill(process.pid)  # and what it started
            process.wait()
            running.discard(process.pid)
        found = _read(results)
        if problem and problem["status"] == "crashed" and (said := _last_words(log)):
            problem["error"] += f": {said}"
    for step, _ in PROBES[name]:
        if step not in found:
            # The first step without a result is the one that ended the process.
            found[step] = problem or {"status": "not tried"}
            problem = {}
    return found


def _kill(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def _environment(name: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(_OF_A_JOB)}
    kept["TF_CPP_MIN_LOG_LEVEL"] = "3"
    if name == "tf_keras":
        kept["TF_USE_LEGACY_KERAS"] = "1"
    return kept


def _ending(status: int) -> Facts:
    if status < 0:
        return {"status": "crashed", "error": f"the process ended with {_signal(-status)}"}
    return {"status": "crashed", "error": f"the process exited with {status}"} if status else {}


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _read(results: IO[bytes]) -> dict[str, Facts]:
    found: dict[str, Facts] = {}
    results.seek(0)
    for line in results.read().decode(errors="replace").splitlines():
        with contextlib.suppress(ValueError, KeyError):  # half a line, of a process that was ended
            facts = json.loads(line)
            step = facts.pop("step")
            found[step] = {key: _short(value) for key, value in facts.items()}
    return found


def _short(value: Any) -> Any:
    if isinstance(value, str):
        value = tidy(value)
        return value if len(value) <= _LONGEST else f"{value[:_LONGEST]} [...]"
    if isinstance(value, list):
        return [_short(item) for item in value]
    return value


def _last_words(log: IO[bytes]) -> str:
    """The line of standard error that tells most."""
    log.seek(0)
    lines = log.read().decode(errors="replace").splitlines()
    fatal = [line for line in lines if line.startswith("Fatal Python error")]
    last = [line for line in lines if line.strip()][-1:]
    return str(_short(" ".join(fatal[:1] or last)))


def tidy(text: str) -> str:
    """A text without the name of the user's folder."""
    home = os.path.expanduser("~")
    return text.replace(home, "~") if len(home) > 1 else text
