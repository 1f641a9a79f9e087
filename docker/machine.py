"""How this machine's pip and apt reach their packages: a folder to mount while an image is built.

A machine may have a package index of its own, a certificate for it, a folder of wheels, a proxy.
A build in a container knows none of that, and none of it shall stay in an image or in this
repository: it is read when a build starts, and the folder is that build's context `machine`.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from urllib.parse import unquote, urlsplit

MOUNT = "/run/machine"
# Of all that can be set for pip, what says where packages come from and how to reach them.
PIP_OPTIONS = (
    *("index-url", "extra-index-url", "find-links", "no-index", "trusted-host", "proxy"),
    *("cert", "client-cert", "timeout", "default-timeout", "retries"),
)
# Where other programs of this machine look for certificates, if pip was not told.
CERTIFICATES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE")
PROXIES = ("http_proxy", "https_proxy", "no_proxy")


def pip_options(listing: str, environ: Mapping[str, str]) -> dict[str, str]:
    """The options that matter, from `pip config list`; the environment overrules files."""
    found: dict[str, str] = {}
    lines = [line.partition("=") for line in listing.splitlines()]
    for section in ("global", "install", ":env:"):
        for name, _, value in lines:
            where, _, option = name.rpartition(".")
            if where == section and option in PIP_OPTIONS:
                found[option] = str(ast.literal_eval(value))
    if certificate := next((environ[name] for name in CERTIFICATES if environ.get(name)), None):
        found.setdefault("cert", certificate)
    return found


def local_path(word: str) -> Path | None:
    """The file or folder of this machine that a word of an option names, if it does."""
    parts = urlsplit(word)
    path = Path(unquote(parts.path)) if parts.scheme == "file" else Path(word)
    return path if path.is_absolute() and path.exists() else None


def link(source: str | Path, target: str | Path) -> None:
    """A hard link: a builder sees a file, but no byte is copied; on another disk, a copy."""
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copy2(source, target)


def bring(path: Path, files: Path) -> str:
    """Bring a file or folder along; return the path it will have during the build."""
    # The pages of an index that is a folder point to their files by ../../: bring those too.
    root = path.parent if path.is_dir() and path.name == "simple" else path
    files.mkdir(exist_ok=True)
    target = files / f"{len(list(files.iterdir()))}-{root.name}"
    if root.is_file():
        link(root, target)
    else:
        shutil.copytree(root, target, copy_function=link)
    return "/".join([MOUNT, files.name, target.name, *path.relative_to(root).parts])


def pip_conf(options: Mapping[str, str], bring: Callable[[Path], str]) -> str:
    lines = ["[global]"]
    for option, value in sorted(options.items()):
        words = []
        for word in value.split():
            path = local_path(word)
            scheme = "file://" if word.startswith("file:") else ""
            words.append(scheme + bring(path) if path else word)
        lines.append(f"{option} = " + "\n    ".join(words))
    return "\n".join(lines) + "\n"


def apt_conf(dump: str, bring: Callable[[Path], str]) -> str:
    """Proxies and certificates from `apt-config dump`."""
    wanted = re.compile(r'(Acquire::https?::(?:Proxy\S*|CAInfo|Verify-Peer)) "(.+)";')
    lines = []
    for name, value in wanted.findall(dump):
        path = local_path(value)
        lines.append(f'{name} "{bring(path) if path else value}";')
    return "\n".join(lines) + "\n"


def output(*command: str) -> str:
    """What a program prints, or nothing where it is not there or fails."""
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""


def write(folder: Path, wheels: Path, environ: Mapping[str, str] = os.environ) -> Path:
    """Make the folder anew, for its owner only: the address of an index may hold a password.

    With it goes what horovod_wheel.py has cached in `wheels`: minutes of compiling, where they fit.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, mode=0o700)
    brought: dict[Path, str] = {}

    def bring_once(path: Path) -> str:
        if path not in brought:
            brought[path] = bring(path, folder / "files")
        return brought[path]

    listing = output(sys.executable, "-m", "pip", "--disable-pip-version-check", "config", "list")
    (folder / "pip.conf").write_text(pip_conf(pip_options(listing, environ), bring_once))
    for wheel in wheels.glob("*/manifest.json"):
        shutil.copytree(wheel.parent, folder / "wheels" / wheel.parent.name, copy_function=link)
    (folder / "apt.conf").write_text(apt_conf(output("apt-config", "dump"), bring_once))
    return folder


def proxies(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The proxy variables that are set, which every builder knows as build arguments."""
    names = [spelling for name in PROXIES for spelling in (name, name.upper())]
    return {name: environ[name] for name in names if environ.get(name)}
