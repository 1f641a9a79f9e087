"""A single host: running commands on it, and switching it off."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.hosts.environment import command_environment
from benchmarks.hosts.links import INTERFACE, Counters, Link
from benchmarks.hosts.namespaces import HostsError, enter, first_process, start_host


class Host:
    """One of ``Hosts``, which makes them.

    Args:
        index: its number among the hosts.
        rack: first process of the rack.

    Attributes:
        name: its host name.
        address: its IPv4 address on ``eth0``.
    """

    def __init__(self, index: int, rack: int) -> None:
        self.name, self.address = f"host{index}", f"10.0.0.{index + 1}"
        self._rack, self._port = rack, f"port{index}"
        self._process = start_host(rack, self.name, self.address, INTERFACE)

    def connect(self, rate: str | None, deadline: float) -> None:
        """Connects the new host to the switch and waits for its sshd.

        Args:
            rate: of the link, see ``set_rate``.
            deadline: by ``time.monotonic()``, for sshd.

        Raises:
            HostsError: the host or its sshd did not start.
        """
        self._first = first_process(self._process)
        self._link = Link(self._rack, self._first, self._port)
        self._link.set_rate(rate)
        print("plugged in", file=self._process.stdin, flush=True)
        port_22_listens = re.compile(r": 00000000:0016 00000000:0000 0A ")
        while not port_22_listens.search(Path(f"/proc/{self._first}/net/tcp").read_text()):
            if self._process.poll() is not None:
                raise HostsError(f"{self.name} did not start: {self._process.communicate()[0]}")
            if time.monotonic() > deadline:
                raise HostsError(f"sshd of {self.name} did not start in time")
            time.sleep(0.01)

    def wait_until_ended(self) -> None:
        """Waits for the end of a host whose processes have been killed."""
        self._process.communicate()

    def _check_on(self) -> None:
        if self._process.poll() is not None:
            raise HostsError(f"{self.name} is off")

    def popen(self, command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """Starts a command on this host.

        Args:
            command: the program and its arguments.
            **options: of ``subprocess.Popen``; ``env`` adds to this process's environment.

        What Popen's methods stop is the command itself at once, not what it has started.

        Raises:
            HostsError: the host is off.
        """
        self._check_on()
        options["env"] = {**command_environment(), **(options.get("env") or {})}
        directory = os.path.abspath(options.pop("cwd", None) or ".")
        prefix = [*enter(self._first), "setpriv", "--pdeathsig=KILL"]
        return subprocess.Popen([*prefix, "env", f"--chdir={directory}", *command], **options)

    def run(
        self, command: Sequence[str], time_limit: float, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command on this host to its end.

        Args:
            command: the program and its arguments.
            time_limit: seconds after which every process on this host is killed.
            **options: of ``popen``, besides output: that is captured, stdout and stderr as one.

        Raises:
            HostsError: the host is off.
            subprocess.TimeoutExpired: the time was up; its ``output`` is what had been printed.
        """
        options |= {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE}
        options |= {"stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
        with self.popen(command, **options) as process:
            try:
                output, _ = process.communicate(timeout=time_limit)
            except BaseException as error:
                with contextlib.suppress(HostsError):
                    self.kill_processes()
                if isinstance(error, subprocess.TimeoutExpired):
                    error.output, _ = process.communicate()
                raise
        return subprocess.CompletedProcess(list(command), process.returncode, output)

    def kill_processes(self) -> None:
        """Kills all that runs on this host but its sshd.

        Raises:
            HostsError: the host is off.
        """
        self._check_on()
        # -1 is everybody but the sender and the first process; it may be nobody.
        subprocess.run([*enter(self._first), "sh", "-c", "kill -KILL -1 2>/dev/null || true"])

    def kill(self) -> None:
        """Simulates a power failure: the link goes dead, then all processes do, for good."""
        if self._process.poll() is None:
            # First the link: no connection may be closed in good order.
            self._link.cut()
            os.kill(self._first, signal.SIGKILL)
            self._process.wait()

    @property
    def rate(self) -> str | None:
        """Rate of its link in each direction, as given; None for as fast as the machine can."""
        return self._link.rate

    def set_rate(self, rate: str | None) -> None:
        """Changes the rate of this host's link, in each direction.

        Args:
            rate: as in "100mbit" or "2.5gbit"; None for as fast as the machine can.

        Raises:
            ValueError: the rate is not of that form.
            HostsError: the host is off.
        """
        self._check_on()
        self._link.set_rate(rate)

    def counters(self) -> Counters:
        """Returns what its interface has received and sent so far.

        Raises:
            HostsError: the host is off.
        """
        self._check_on()
        return self._link.counters()
