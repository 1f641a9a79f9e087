"""Cores, memory, network and tools of this machine, without anything that must be installed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import shutil
import socket
import struct
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

Facts = dict[str, Any]
_GET_ADDRESS = 0x8915  # SIOCGIFADDR: an interface's IPv4 address
_LOOPBACK = 0x8
_UP = 0x1


def machine(host_name: bool) -> Facts:
    """What the machine has. Without ``host_name``, nothing that tells whose it is."""
    return {
        **({"host": socket.gethostname()} if host_name else {}),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "libc": " ".join(platform.libc_ver()),
        **_cores(),
        **_memory(),
        "interfaces": _interfaces(),
        "name_is_loopback": _name_is_loopback(),
        "gpus": _gpus(),
    }


def tools() -> Facts:
    """Programs that start jobs and build Horovod; None where one is missing."""
    return {
        # Beside the interpreter, too: an environment may be used without being in PATH.
        "horovodrun": _found("horovodrun"),
        "mpirun": _first_line("mpirun", "--version"),
        "srun": _first_line("srun", "--version"),
        "nvcc": _last_line("nvcc", "--version"),
        "g++": bool(shutil.which("c++") or shutil.which("g++")),
        "make": bool(shutil.which("make") or shutil.which("ninja")),
        "cmake": bool(shutil.which("cmake")),
        "python3-dev": (Path(sysconfig.get_path("include")) / "Python.h").exists(),
    }


def _found(program: str) -> bool:
    beside = os.path.join(sysconfig.get_path("scripts"), program)
    return bool(shutil.which(program) or shutil.which(beside))


def _cores() -> Facts:
    facts: Facts = {"cores": os.cpu_count(), "cores_usable": len(os.sched_getaffinity(0))}
    words = _read("/sys/fs/cgroup/cpu.max").split()
    if len(words) == 2 and words[0].isdigit():
        facts["cores_quota"] = round(int(words[0]) / int(words[1]), 2)
    return facts


def _memory() -> Facts:
    """In bytes."""
    facts: Facts = {}
    names = {"MemTotal": "memory", "MemAvailable": "memory_available"}
    for line in _read("/proc/meminfo").splitlines():
        name, _, value = line.partition(":")
        if name in names:
            facts[names[name]] = int(value.split()[0]) * 1024
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    if limit.isdigit():
        facts["memory_limit"] = int(limit)
    with contextlib.suppress(OSError):
        facts["shared_memory"] = shutil.disk_usage("/dev/shm").total
    return facts


def _interfaces() -> list[Facts]:
    """Network interfaces, without addresses."""
    found = []
    for _, name in socket.if_nameindex():
        folder = Path("/sys/class/net") / name
        flags = int(_read(folder / "flags").strip() or "0", 16)
        speed = _read(folder / "speed").strip()
        found.append(
            {
                "name": name,
                "up": bool(flags & _UP),
                "loopback": bool(flags & _LOOPBACK),
                "ipv4": _has_ipv4(name),
                # A virtual one says -1, or nothing.
                "mbit_per_s": int(speed) if speed.isdigit() and int(speed) > 0 else None,
            }
        )
    return found


def _has_ipv4(interface: str) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        try:
            fcntl.ioctl(any_socket, _GET_ADDRESS, struct.pack("256s", interface.encode()[:15]))
        except OSError:
            return False
    return True


def _name_is_loopback() -> bool:
    """Whether /etc/hosts gives this host's name an address that others do not reach."""
    lines = (line.partition("#")[0].split() for line in _read("/etc/hosts").splitlines())
    name = socket.gethostname()
    return any(words[0].startswith("127.") and name in words[1:] for words in lines if words)


def _gpus() -> list[str]:
    """What NVIDIA's driver says, whether or not a framework can use it."""
    query = ("--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")
    return _said("nvidia-smi", *query).splitlines()


def _first_line(*command: str) -> str | None:
    return next(iter(_said(*command).splitlines()), None)


def _last_line(*command: str) -> str | None:
    return next(iter(reversed(_said(*command).splitlines())), None)


def _said(*command: str) -> str:
    """What a program prints; nothing where it is missing, fails or hangs."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=20, errors="replace"
        )
        return done.stdout.strip()
    return ""


def _read(path: str | Path) -> str:
    with contextlib.suppress(OSError, ValueError):
        return Path(path).read_text()
    return ""
