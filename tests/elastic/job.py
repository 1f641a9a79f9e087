"""Real elastic jobs on this machine: hosts come and go, and workers die.

Horovod blacklists the host of a worker that dies, with all workers there.  So each worker that is
to die alone has a host of its own: another way to write 127.0.0.1, which Horovod takes for another
host, and for this machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest

from tests.elastic.worker import MARK, ORDERS
from tests.jobs import Job, controller

# Horovod's elastic training is made for Gloo.
needs_gloo = pytest.mark.skipif(controller() != "gloo", reason="elastic training needs Gloo")

CHANGE = 300  # seconds until what is awaited has happened; more means that something hangs
_POLL = 0.1  # seconds
_T = TypeVar("_T")
Event = dict[str, Any]


def host(number: int) -> str:
    """A name of this machine, unlike those of other numbers."""
    return "127.0.0." + "0" * number + "1"


class ElasticJob(Job):
    """An elastic job; for ``with``.

    Args:
        command: arguments of the Python interpreter, the same for all workers.
        hosts: slots of each host at the beginning, by name (see ``host``); all are filled.
        env: environment variables besides this process's own.
        min_ranks: below which training waits.
        max_ranks: above which slots stay free.
        options: further ones of horovodrun.

    What workers ``say`` (tests/elastic/worker.py) is among ``events``.
    """

    def __init__(
        self,
        command: list[str],
        hosts: Mapping[str, int],
        env: Mapping[str, str] | None = None,
        min_ranks: int = 1,
        max_ranks: int = 8,
        options: Sequence[str] = (),
    ) -> None:
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        self._file, script = folder / "hosts", folder / "discover.sh"
        self.hosts = dict(hosts)
        self._write_hosts()
        script.write_text(f"#!/bin/sh\ncat {self._file}\n")
        script.chmod(0o755)
        self._orders = folder / "orders"
        self._orders.mkdir()
        elastic = ["--min-np", str(min_ranks), "--max-np", str(max_ranks)]
        elastic += ["--host-discovery-script", str(script), "--network-interface", "lo"]
        super().__init__(
            sum(hosts.values()),
            command,
            {
                "HOROVOD_DYNAMIC_PROCESS_SETS": "0",  # they do not go with elastic training
                "HOROVOD_GLOO_TIMEOUT_SECONDS": "30",  # now and then Gloo misses a death
                ORDERS: str(self._orders),
                **(env or {}),
            },
            options=[*elastic, *options],
        )

    def __exit__(self, *details: object) -> None:
        super().__exit__(*details)
        self._folder.cleanup()

    # Hosts and workers --------------------------------------------------------------------------

    def add(self, name: str, slots: int = 1) -> None:
        """A host comes, or has other slots: workers learn of it in a second or two."""
        self.hosts[name] = slots
        self._write_hosts()

    def remove(self, *names: str) -> None:
        """Hosts go, in order: their workers leave at the next ``commit()``."""
        for name in names:
            del self.hosts[name]
        self._write_hosts()

    def workers(self, name: str) -> list[int]:
        """Processes that run the job's program on a host now, in the order of their start."""
        found = []
        for process in psutil.Process(self._process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if process.environ().get("HOROVOD_HOSTNAME") == name:
                    found.append((process.create_time(), process.pid))
        return [pid for _, pid in sorted(found)]

    def kill(self, pid: int) -> None:
        """Ends a worker with SIGKILL, wherever it is; its host is never used again."""
        os.kill(pid, signal.SIGKILL)

    def order(self, who: int | str, what: str) -> None:
        """Gives an order, for ``order`` and ``die_if`` in tests/elastic/worker.py.

        Args:
            who: a worker's process; or a host, whose workers have yet to start.
            what: the order.
        """
        whole = self._orders / f"{who}.new"
        whole.write_text(what)
        whole.rename(self._orders / str(who))

    def _write_hosts(self) -> None:
        whole = self._file.with_suffix(".new")  # the script must not see half of it
        whole.write_text("".join(f"{name}:{slots}\n" for name, slots in self.hosts.items()))
        whole.rename(self._file)

    # What happens -------------------------------------------------------------------------------

    def events(self, what: str = "") -> list[Event]:
        """All that workers have said so far, or all of one kind, in the order of output."""
        whole_lines = self.output().rpartition("\n")[0].split("\n")
        events = [json.loads(line.partition(MARK)[2]) for line in whole_lines if MARK in line]
        return [event for event in events if what in ("", event["what"])]

    def wait_until(self, condition: Callable[[], _T], words: str, time_limit: float = CHANGE) -> _T:
        """Waits until a condition holds, and returns what it gave.

        Args:
            condition: gives something true in the end.
            words: what it is.
            time_limit: seconds.

        Fails the test, showing the output, if the job ends before, or the time is up.
        """
        end = time.monotonic() + time_limit
        while True:
            runs = self.runs()
            if result := condition():
                return result
            if not runs:
                self.fail(f"the job ended before: {words}")
            if time.monotonic() > end:
                self.fail(f"not within {time_limit} s: {words}")
            time.sleep(_POLL)

    def fail(self, problem: str) -> None:
        """Ends the job, and fails the test, with what all workers have printed."""
        self._kill()
        pytest.fail(f"{problem}:\n{self.output()}", pytrace=False)
