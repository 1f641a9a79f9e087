"""A number of hosts that are joined by a switch, for as long as a ``with`` block runs."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any

from benchmarks.hosts.environment import sshd_config, what_is_missing
from benchmarks.hosts.host import Host
from benchmarks.hosts.links import INTERFACE, bits_per_second
from benchmarks.hosts.namespaces import HostsError, first_process, start_rack

START_LIMIT = 120  # seconds in which the sshd of every host has to start


class Hosts:
    """A number of hosts, from ``with Hosts(...) as hosts:`` until that block ends.

    Args:
        count: number of hosts, 1 to 200.
        rate: of each host's link in each direction, as in "100mbit"; None for as fast as can be.

    Raises:
        ValueError: an argument is out of range.
        HostsError: on entering the block: hosts cannot be made here.
    """

    def __init__(self, count: int, rate: str | None = None) -> None:
        if not 1 <= count <= 200:
            raise ValueError(f"cannot make {count} hosts: 1 to 200 can be made")
        bits_per_second(rate)
        self._count, self._rate = count, rate
        self._hosts: list[Host] = []
        self._rack: subprocess.Popen[str] | None = None

    def __enter__(self) -> Hosts:
        if missing := what_is_missing():
            raise HostsError(missing)
        if self._rack:
            raise HostsError("these hosts have been used; make new ones")
        names = [f"10.0.0.{index + 1} host{index}\n" for index in range(self._count)]
        self._rack = start_rack("127.0.0.1 localhost\n" + "".join(names), sshd_config())
        self._first = self._rack.pid
        try:
            self._first = first_process(self._rack)
            self._hosts = [Host(index, self._first) for index in range(self._count)]
            deadline = time.monotonic() + START_LIMIT
            for host in self._hosts:
                host.connect(self._rate, deadline)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends all hosts at once. When it returns, none of their processes is left."""
        if self._rack and self._rack.poll() is None:
            os.kill(self._first, signal.SIGKILL)
        for host in self._hosts:
            host.wait_until_ended()
        if self._rack:
            self._rack.communicate()

    def __getitem__(self, index: int) -> Host:
        return self._hosts[index]

    def __iter__(self) -> Iterator[Host]:
        return iter(self._hosts)

    def __len__(self) -> int:
        return len(self._hosts)

    def slots(self, per_host: Sequence[int] | None = None) -> str:
        """Returns the argument of the option -H: "host0:1,host1:2".

        Args:
            per_host: number of processes for each host, 0 for none; by default 1 for each.

        Raises:
            ValueError: there is not one number for each host, or a number is negative.
        """
        per_host = [1] * len(self) if per_host is None else per_host
        if len(per_host) != len(self) or min(per_host) < 0 or not any(per_host):
            raise ValueError(f"slots {list(per_host)} do not fit {len(self)} hosts")
        pairs = zip(self._hosts, per_host, strict=True)
        return ",".join(f"{host.name}:{slots}" for host, slots in pairs if slots)

    def horovodrun_options(self, per_host: Sequence[int] | None = None) -> list[str]:
        """Returns what tells horovodrun where to run, with or without Open MPI.

        With the interface named it saves the search for one, some seconds. Its cache of the search
        and of whether ssh works would be left in the home directory, and be wrong next time.

        Args:
            per_host: see ``slots``.
        """
        return ["-H", self.slots(per_host), "--network-interfaces", INTERFACE, "--disable-cache"]

    def run(
        self, command: Sequence[str], time_limit: float, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command on the first host; if it ends early, all processes of all hosts do.

        Args:
            command: the program and its arguments.
            time_limit: seconds after which every process on every host is killed.
            **options: see ``Host.run``, which also says what is raised.
        """
        try:
            return self[0].run(command, time_limit, **options)
        except BaseException:
            for host in self:
                with contextlib.suppress(HostsError):
                    host.kill_processes()
            raise


@functools.cache
def why_not() -> str | None:
    """Says why hosts cannot be made here, having tried with two; None if they can."""
    try:
        with Hosts(2, rate="10mbit") as hosts:
            hosts.run(["ssh", hosts[1].name, "true"], time_limit=120).check_returncode()
    except (HostsError, OSError, subprocess.SubprocessError) as problem:
        return " ".join(str(problem).split())
    return None
