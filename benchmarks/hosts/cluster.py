#!/usr/bin/env python3
"""Hosts with slow links, all on this Linux machine, to run horovodrun or mpirun across.

    python -m benchmarks.hosts --hosts 4 --rate 100mbit -- horovodrun -np 4 python train.py

Each host has its own name (host0, host1, ...), address, network interface `eth0`, processes and
sshd; a switch joins them. Files, processors and memory are this machine's, and there is no way out
of that network. Every host can `ssh` to every other without a question. A command is run on host0,
and two things are done for it: if it is horovodrun without hosts of its own, it is told which hosts
there are, and `{hosts}` in an argument becomes host0:1,host1:1,... for whoever else wants to know.

How it works: a host is a set of kernel namespaces, and so is the "rack" around them, which holds
the switch. Nothing is made outside, so nothing outside changes, and racks side by side do not meet.
The kernel kills the rack when the process (strictly, the thread) that made it ends, however it
ends; and with the rack goes all that ran in it, its interfaces and its files: /etc/ssh, /etc/hosts,
~/.ssh, ~/.bashrc, /run and /dev/shm in there are the hosts' own, in memory, and so is TMPDIR.

Needs root, and Debian's packages iproute2, openssh-server and openssh-client.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import psutil

INTERFACE = "eth0"
PACKAGES = {
    "iproute2": ("ip", "tc"),
    "openssh-server": ("sshd",),
    "openssh-client": ("ssh", "ssh-keygen"),
    "util-linux": ("unshare", "nsenter", "setpriv"),
}
NAMESPACES = ("--mount", "--net", "--uts", "--ipc", "--pid")
UNSHARE = ("unshare", *NAMESPACES, "--fork", "--mount-proc")

# First process of the rack. Hosts copy its mounts, so what is mounted here they all have.
RACK = r"""
hosts=$1 sshd_config=$2
mount -t tmpfs -o mode=0755 none /etc/ssh
cd /etc/ssh
ssh-keygen -q -t ed25519 -N '' -C '' -f key
cp key.pub authorized_keys
echo "* $(cat key.pub)" > ssh_known_hosts
printf '%s\n' IdentityFile=/etc/ssh/key IdentitiesOnly=yes UserKnownHostsFile=/dev/null > ssh_config
printf '%s' "$sshd_config" > sshd_config
printf '%s' "$hosts" > hosts
mount --bind hosts /etc/hosts
[ ! -d ~root/.ssh ] || mount -t tmpfs none ~root/.ssh
# A shell started by ssh reads these. They may change PATH, be slow, and lock what they write to:
# killed half-way, they would leave the lock behind.
touch empty
for file in ~root/.bashrc ~root/.zshenv; do
    [ ! -e "$file" ] || mount --bind empty "$file"
done
! [ -e /proc/sys/net/ipv6 ] || echo 1 > /proc/sys/net/ipv6/conf/default/disable_ipv6
ip link add switch type bridge mcast_snooping 0
ip link set switch up
echo up
exec sleep infinity
"""
# First process of a host; it becomes sshd, which also reaps orphans as an init has to.
HOST = r"""
name=$1 address=$2 interface=$3
echo "$name" > /proc/sys/kernel/hostname
! [ -e /proc/sys/net/ipv6 ] || echo 1 > /proc/sys/net/ipv6/conf/default/disable_ipv6
mount -t tmpfs -o mode=1777 none /dev/shm
mount -t tmpfs -o mode=0755 none /run
mkdir /run/sshd /run/cgroup
mount --rbind /sys/fs/cgroup /run/cgroup
mount -t sysfs none /sys  # which shows the interfaces of whoever mounts it
mount --move /run/cgroup /sys/fs/cgroup
mkdir -m 1777 /run/tmp
echo up
read -r plugged_in
ip link set lo up
ip address add "$address/24" dev "$interface"
ip link set "$interface" up
exec "$(command -v sshd)" -D -e  # it insists on an absolute path
"""
SSHD_CONFIG = """\
AddressFamily inet
HostKey /etc/ssh/key
AuthorizedKeysFile /etc/ssh/authorized_keys
PermitRootLogin prohibit-password
StrictModes no
PasswordAuthentication no
MaxStartups 1000
MaxSessions 1000
UseDNS no
PrintMotd no
PidFile none
LogLevel ERROR
SetEnv {environment}
"""


class HostsError(RuntimeError):
    """Hosts cannot be made here, or one of them cannot do what was asked."""


class Counters(NamedTuple):
    """What passed a host's interface since it was made. Bytes include Ethernet's headers.

    Where the kernel joins several packets of a stream (offloading), it counts them as one.
    """

    received_bytes: int
    received_packets: int
    sent_bytes: int
    sent_packets: int


class Host:
    """One of `Hosts`, which makes them.

    Attributes:
        name: its host name.
        address: its IPv4 address on `eth0`.
        rate: of its link in each direction, as given; None for as fast as the machine can.
    """

    def __init__(self, index: int, rack: int) -> None:
        self.name, self.address = f"host{index}", f"10.0.0.{index + 1}"
        self.rate: str | None = None
        self._rack, self._port = rack, f"port{index}"
        script = ["sh", "-ec", HOST, "sh", self.name, self.address, INTERFACE]
        self._process = start([*enter(rack), *UNSHARE, *script])

    def _plug_in(self, rate: str | None, deadline: float) -> None:
        self._init = first_process(self._process)
        plug = f"ip link add {self._port} type veth peer name {INTERFACE} netns {self._init}"
        tool(self._rack, plug)
        tool(self._rack, f"ip link set {self._port} master switch up")
        self.set_rate(rate)
        print("plugged in", file=self._process.stdin, flush=True)
        port_22_listens = re.compile(r": 00000000:0016 00000000:0000 0A ")
        while not port_22_listens.search(Path(f"/proc/{self._init}/net/tcp").read_text()):
            if self._process.poll() is not None:
                raise HostsError(f"{self.name} did not start: {self._process.communicate()[0]}")
            if time.monotonic() > deadline:
                raise HostsError(f"sshd of {self.name} did not start in time")
            time.sleep(0.01)

    def _alive(self) -> int:
        if self._process.poll() is not None:
            raise HostsError(f"{self.name} is off")
        return self._init

    def popen(self, command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """Starts a command on this host.

        Args:
            command: the program and its arguments.
            options: of `subprocess.Popen`; `env` adds to this process's environment.

        What Popen's methods stop is the command itself at once, not what it has started.

        Raises:
            HostsError: the host is off.
        """
        options["env"] = {**environment(), **(options.get("env") or {})}
        directory = os.path.abspath(options.pop("cwd", None) or ".")
        prefix = [*enter(self._alive()), "setpriv", "--pdeathsig=KILL"]
        return subprocess.Popen([*prefix, "env", f"--chdir={directory}", *command], **options)

    def run(
        self, command: Sequence[str], time_limit: float, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command on this host to its end.

        Args:
            command: the program and its arguments.
            time_limit: seconds after which every process on this host is killed.
            options: of `popen`, besides output: that is captured, stdout and stderr as one.

        Raises:
            HostsError: the host is off.
            subprocess.TimeoutExpired: the time was up; its `output` is what had been printed.
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
        # -1 is everybody but the sender and the first process; it may be nobody.
        subprocess.run([*enter(self._alive()), "sh", "-c", "kill -KILL -1 2>/dev/null || true"])

    def kill(self) -> None:
        """Power failure: its link goes dead, and then all its processes are, for good."""
        if self._process.poll() is None:
            # First the link: no connection may be closed in good order.
            tool(self._rack, f"ip link set {self._port} down")
            os.kill(self._init, signal.SIGKILL)
            self._process.wait()

    def set_rate(self, rate: str | None) -> None:
        """Changes the speed of this host's link, in each direction.

        Args:
            rate: as in "100mbit" or "2.5gbit"; None for as fast as the machine can.

        Raises:
            ValueError: the rate is not of that form.
            HostsError: the host is off.
        """
        bits, host = bits_per_second(rate), self._alive()
        # What may go at once is what takes a quarter of a millisecond, or two packets: with more,
        # small messages would pass as if the link were fast; with less, a late timer would cost
        # rate. What the kernel joins stays below that, as the shaper would have to split it.
        # 50 ms of traffic, or some packets, may wait: so much a switch's buffer might hold.
        burst = max((bits or 0) // 32000, 3200)
        limit = burst + max((bits or 0) // 160, 64_000)
        joined = 65536 if bits is None else min(burst * 9 // 10, 65536)
        tool(host, f"ip link set dev {INTERFACE} gso_max_size {joined}")
        for namespace, device in ((host, INTERFACE), (self._rack, self._port)):
            if bits is not None:
                shape = f"tbf rate {bits}bit burst {burst}b limit {limit}b"
                tool(namespace, f"tc qdisc replace dev {device} root {shape}")
            elif self.rate is not None:
                tool(namespace, f"tc qdisc delete dev {device} root")
        self.rate = rate

    def counters(self) -> Counters:
        """What its interface has received and sent so far.

        Raises:
            HostsError: the host is off.
        """
        (link,) = json.loads(tool(self._alive(), f"ip -s -j link show dev {INTERFACE}"))
        received, sent = link["stats64"]["rx"], link["stats64"]["tx"]
        return Counters(received["bytes"], received["packets"], sent["bytes"], sent["packets"])


class Hosts:
    """A number of hosts, from `with Hosts(...) as hosts:` until that block ends.

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
        if missing := missing_tools():
            raise HostsError(missing)
        if self._rack:
            raise HostsError("these hosts have been used; make new ones")
        names = [f"10.0.0.{index + 1} host{index}\n" for index in range(self._count)]
        files = ["127.0.0.1 localhost\n" + "".join(names), sshd_config()]
        rack = ["setpriv", "--pdeathsig=KILL", *UNSHARE, "--kill-child"]
        self._rack = start([*rack, "sh", "-ec", RACK, "sh", *files])
        self._init = self._rack.pid
        try:
            self._init = first_process(self._rack)
            self._hosts = [Host(index, self._init) for index in range(self._count)]
            deadline = time.monotonic() + 30
            for host in self._hosts:
                host._plug_in(self._rate, deadline)
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
            os.kill(self._init, signal.SIGKILL)
        for process in [*(host._process for host in self._hosts), self._rack]:
            if process:
                process.communicate()

    def __getitem__(self, index: int) -> Host:
        return self._hosts[index]

    def __iter__(self) -> Iterator[Host]:
        return iter(self._hosts)

    def __len__(self) -> int:
        return len(self._hosts)

    def slots(self, per_host: Sequence[int] | None = None) -> str:
        """For the option -H: "host0:1,host1:2".

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
        """What tells horovodrun where to run, with or without Open MPI.

        With the interface named it saves the search for one, some seconds. Its cache of the search
        and of whether ssh works would be left in the home directory, and be wrong next time.
        """
        return ["-H", self.slots(per_host), "--network-interfaces", INTERFACE, "--disable-cache"]

    def run(
        self, command: Sequence[str], time_limit: float, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """`Host.run` on the first host; when it ends early, that is so for all hosts."""
        try:
            return self[0].run(command, time_limit, **options)
        except BaseException:
            for host in self:
                with contextlib.suppress(HostsError):
                    host.kill_processes()
            raise


def bits_per_second(rate: str | None) -> int | None:
    if rate is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kmg])bit", rate)
    bits = float(found[1]) * {"k": 1e3, "m": 1e6, "g": 1e9}[found[2]] if found else 0
    if not 1e5 <= bits <= 1e11:
        raise ValueError(f"rate {rate!r} is not one like '100mbit', from 100kbit to 100gbit")
    return int(bits)


def environment() -> dict[str, str]:
    """For commands: this process's, with its Python's scripts in PATH and a TMPDIR that goes."""
    path = f"{Path(sys.executable).parent}:{search_path()}"
    return {**os.environ, "PATH": path, "TMPDIR": "/run/tmp"}


def sshd_config() -> str:
    """Lets ssh sessions find programs and modules where this process does."""
    names = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "TMPDIR")
    found = {name: value for name, value in environment().items() if name in names}
    assignments = " ".join(f'"{name}={value}"' for name, value in found.items())
    return SSHD_CONFIG.format(environment=assignments)


def search_path() -> str:
    """Users' PATH often lacks where the tools of administrators are."""
    return f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"


def missing_tools() -> str | None:
    if os.geteuid() != 0:
        return "only root can make network namespaces"
    missing = [
        package
        for package, tools in PACKAGES.items()
        if not all(shutil.which(tool, path=search_path()) for tool in tools)
    ]
    return f"missing packages (as Debian names them): {' '.join(missing)}" if missing else None


@functools.cache
def why_not() -> str | None:
    """Why hosts cannot be made here, or None if they can: two are, to see."""
    try:
        with Hosts(2, rate="10mbit") as hosts:
            hosts.run(["ssh", hosts[1].name, "true"], time_limit=20).check_returncode()
    except (HostsError, OSError, subprocess.SubprocessError) as problem:
        return " ".join(str(problem).split())
    return None


def enter(process: int, *namespaces: str) -> list[str]:
    return ["nsenter", f"--target={process}", *(namespaces or NAMESPACES)]


def tool(process: int, command: str) -> str:
    """Runs ip or tc in the network of a process; PIDs in the command are still ours."""
    ended = subprocess.run(
        [*enter(process, "--net"), *command.split()],
        env={**os.environ, "PATH": search_path()},
        capture_output=True,
        text=True,
    )
    if ended.returncode:
        raise HostsError(f"{command}: {ended.stderr.strip()}")
    return ended.stdout


def start(command: Sequence[str]) -> subprocess.Popen[str]:
    """In a session of its own: a Ctrl-C is for the commands that run on hosts, not for hosts."""
    return subprocess.Popen(
        command,
        env={**os.environ, "PATH": search_path()},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def first_process(namespaces: subprocess.Popen[str]) -> int:
    """Waits until the script that was started in new namespaces is ready; its PID out here."""
    line = next(iter(namespaces.stdout or ()), "")
    if line != "up\n":
        raise HostsError(f"cannot make namespaces: {line}{namespaces.communicate()[0]}")
    process = psutil.Process(namespaces.pid)
    while children := process.children():
        (process,) = children
    return int(process.pid)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    rate = "of each link, in each direction, as in 100mbit (default: as fast as can be)"
    slots = "processes for each host, as in 1,1,2 (default: 1 each)"
    parser.add_argument("--hosts", type=int, default=2, help="number of hosts (default: 2)")
    parser.add_argument("--rate", help=rate)
    parser.add_argument("--slots", type=lambda text: [*map(int, text.split(","))], help=slots)
    parser.add_argument("command", nargs="+", help="put -- before it")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        with Hosts(options.hosts, options.rate) as hosts:
            slots = hosts.slots(options.slots)
            program, *rest = (word.replace("{hosts}", slots) for word in options.command)
            if Path(program).name == "horovodrun":  # its own options come later and win
                rest = [*hosts.horovodrun_options(options.slots), *rest]
            status = hosts[0].popen([program, *rest]).wait()
    except (HostsError, ValueError) as problem:
        print(f"hosts: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main())
