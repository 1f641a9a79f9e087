"""Transfers between hosts, and what must not be left when hosts have ended."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import psutil

from tests.jobs import ROOT

LIMIT = 600  # seconds, for what takes far less

RECEIVE = """
import socket
server = socket.create_server(("", 5000))
print("listens", flush=True)
connection, _ = server.accept()
while connection.recv(1 << 20):
    pass
connection.sendall(b"all")
"""
SEND = """
import socket, sys, time
connection = socket.create_connection(("{to}", 5000))
start = time.monotonic()
connection.sendall(bytes({size}))
connection.shutdown(socket.SHUT_WR)
assert connection.recv(3)
print(time.monotonic() - start)
"""


def transfer(sender, receiver, size):
    """Seconds that `size` bytes take by TCP."""
    command = [sys.executable, "-c", RECEIVE]
    with receiver.popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "listens\n"
        sent = sender.run([sys.executable, "-c", SEND.format(to=receiver.name, size=size)], LIMIT)
    assert sent.returncode == 0, sent.stdout
    return float(sent.stdout)


def outside():
    """What making hosts must not change, as far as nobody else on this machine changes it."""
    files = [
        Path("/etc/hosts"),
        *Path("/etc/ssh").iterdir(),
        *Path("~/.ssh").expanduser().glob("*"),
    ]
    stamps = {str(file): file.stat().st_mtime_ns for file in files if file.exists()}
    there = [
        Path("~/.ssh").expanduser().exists(),
        Path("/run/sshd").exists(),
        Path("/run/here").exists(),
    ]
    there += [Path("/dev/shm/here").exists(), Path("/tmp/here").exists()]
    mounted = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    ours = {"/etc/ssh", "/etc/hosts", "/run", "/dev/shm", "/sys"}
    mounts = sorted(path for path in mounted if path in ours)
    return set(psutil.net_if_addrs()), stamps, there, mounts, os.uname().nodename


def marked(mark):
    """Processes with this number in their environment or arguments, in whatever namespace."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            words = [*process.environ().values(), *process.cmdline()]
            if process.pid != os.getpid() and any(mark in word for word in words):
                found.append(process)
    return found


def on_the_command_line(*arguments, time_limit=LIMIT):
    """Runs ``python -m benchmarks.hosts`` to its end."""
    command = [sys.executable, "-m", "benchmarks.hosts", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    # A harness that is killed takes its hosts with it.
    return subprocess.run(command, cwd=ROOT, env=environment, timeout=time_limit, **pipe)
