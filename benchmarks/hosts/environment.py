"""What hosts need of this machine, and the environment that commands find on them."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

# Debian's packages, and the programs that are used of each.
PACKAGES = {
    "iproute2": ("ip", "tc"),
    "openssh-server": ("sshd",),
    "openssh-client": ("ssh", "ssh-keygen"),
    "util-linux": ("unshare", "nsenter", "setpriv"),
}
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


def what_is_missing() -> str | None:
    """Says what this process lacks to make hosts: root, or packages; None if it has all."""
    if os.geteuid() != 0:
        return "only root can make network namespaces"
    missing = [
        package
        for package, programs in PACKAGES.items()
        if not all(shutil.which(program, path=search_path()) for program in programs)
    ]
    return f"missing packages (as Debian names them): {' '.join(missing)}" if missing else None


def search_path() -> str:
    """Returns PATH with the folders of administrators' programs, which users often lack."""
    return f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"


def command_environment() -> dict[str, str]:
    """Returns the environment for commands on a host.

    It is that of this process, with the scripts of its Python in PATH, and a TMPDIR that ends with
    the host.
    """
    path = f"{Path(sys.executable).parent}:{search_path()}"
    return {**os.environ, "PATH": path, "TMPDIR": "/run/tmp"}


def sshd_config() -> str:
    """Returns sshd's configuration: ssh sessions find programs and modules as commands do."""
    names = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "TMPDIR")
    found = {name: value for name, value in command_environment().items() if name in names}
    assignments = " ".join(f'"{name}={value}"' for name, value in found.items())
    return SSHD_CONFIG.format(environment=assignments)
