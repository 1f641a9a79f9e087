"""Sets of kernel namespaces: how they are made, entered, and when they end.

A host is a set of namespaces, and so is the rack around all hosts, which holds the switch between
them. Nothing is made outside, so nothing outside changes, and racks side by side do not meet. The
kernel kills the rack when the process that made it ends (strictly: the thread), however it ends.
With the rack goes all that ran in it, its interfaces and its files: /etc/ssh, /etc/hosts, ~/.ssh,
~/.bashrc, /run and /dev/shm in there are the hosts' own, in memory, and so is TMPDIR.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence

import psutil

from benchmarks.hosts.environment import search_path

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


class HostsError(RuntimeError):
    """Hosts cannot be made here, or one of them cannot do what was asked."""


def start_rack(hosts_file: str, sshd_config: str) -> subprocess.Popen[str]:
    """Starts the namespaces around all hosts; they end with this process, however it ends.

    Args:
        hosts_file: content of /etc/hosts on every host.
        sshd_config: content of the file that sshd reads on every host.
    """
    script = ["sh", "-ec", RACK, "sh", hosts_file, sshd_config]
    return _start(["setpriv", "--pdeathsig=KILL", *UNSHARE, "--kill-child", *script])


def start_host(rack: int, name: str, address: str, interface: str) -> subprocess.Popen[str]:
    """Starts the namespaces of a host within a rack.

    The script in it waits for a line on its standard input before it configures the interface,
    which has to be there by then.
    """
    return _start([*enter(rack), *UNSHARE, "sh", "-ec", HOST, "sh", name, address, interface])


def _start(command: Sequence[str]) -> subprocess.Popen[str]:
    """Starts a process in a session of its own, so that a Ctrl-C does not reach it.

    It is meant for the commands that run on hosts, not for the hosts.
    """
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
    """Waits until the script in new namespaces is ready.

    Returns:
        The PID that the script's process has outside.

    Raises:
        HostsError: the script has failed; the message is what it printed.
    """
    line = next(iter(namespaces.stdout or ()), "")
    if line != "up\n":
        raise HostsError(f"cannot make namespaces: {line}{namespaces.communicate()[0]}")
    process = psutil.Process(namespaces.pid)
    while children := process.children():
        (process,) = children
    return int(process.pid)


def enter(process: int, *namespaces: str) -> list[str]:
    """Returns the beginning of a command that runs its rest in the namespaces of a process.

    Args:
        process: any process in there, by its PID outside.
        namespaces: options of nsenter; by default all that a host has.
    """
    return ["nsenter", f"--target={process}", *(namespaces or NAMESPACES)]


def configure_network(process: int, command: str) -> str:
    """Runs ip or tc in the network namespace of a process.

    Args:
        process: its PID outside; PIDs in the command are those outside, too.
        command: program and arguments, separated by spaces.

    Returns:
        What the command printed.

    Raises:
        HostsError: the command has failed.
    """
    ended = subprocess.run(
        [*enter(process, "--net"), *command.split()],
        env={**os.environ, "PATH": search_path()},
        capture_output=True,
        text=True,
    )
    if ended.returncode:
        raise HostsError(f"{command}: {ended.stderr.strip()}")
    return ended.stdout
