#!/usr/bin/env python3
"""Make Debian's base image where none can be pulled: debootstrap, then what Debian's own slim has.

    python docker/bootstrap_base.py bookworm | docker import - debian:bookworm-slim

It needs root and debootstrap, and takes packages from where this machine's apt takes its own. The
tar goes to stdout.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

# What Debian's slim images leave out; dpkg then leaves it out of every package installed later.
LEFT_OUT = ("doc", "groff", "info", "linda", "lintian", "locale", "man")
DPKG = "".join(f"path-exclude /usr/share/{name}/*\n" for name in LEFT_OUT)
DPKG += "path-include /usr/share/doc/*/copyright\n"
REMOVED = ("var/lib/apt/lists", "var/cache/apt/archives", "var/log/bootstrap.log")


class BaseError(Exception):
    """There will be no base image, for a reason that the caller can do something about."""


def mirrors(listing: str) -> tuple[str, str]:
    """The archive and, if there is one, the security archive: from `apt-get indextargets`."""
    found: dict[str, str] = {}
    for line in listing.splitlines():
        label, _, uri = line.partition(" ")
        found.setdefault(label, uri.rstrip("/"))
    if "Debian" not in found:
        raise BaseError("apt knows no archive of Debian: run apt-get update first")
    return found["Debian"], found.get("Debian-Security", "")


def sources(suite: str, archive: str, security: str) -> str:
    lines = [f"deb {archive} {suite} main", f"deb {archive} {suite}-updates main"]
    lines += [f"deb {security} {suite}-security main"] if security else []
    return "\n".join(lines) + "\n"


def slim(root: Path) -> None:
    (root / "etc/dpkg/dpkg.cfg.d/docker").write_text(DPKG)
    for name in LEFT_OUT:
        for path in (root / "usr/share" / name).glob("*"):
            keep = ["-not", "-name", "copyright"] if name == "doc" else []
            subprocess.run(["find", path, "-not", "-type", "d", *keep, "-delete"], check=True)
    for name in REMOVED:
        subprocess.run(["find", root / name, "-type", "f", "-delete"], check=False)


def make(suite: str, tar: Path, log: Callable[[str], object]) -> None:
    """Write the base image's file system to `tar`; the log gets what debootstrap says."""
    if os.geteuid():
        raise BaseError("debootstrap needs root")
    command = ["apt-get", "indextargets", "--format", "$(LABEL) $(REPO_URI)"]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    archive, security = mirrors(listing)
    with tempfile.TemporaryDirectory(prefix="base-", dir=tar.parent) as folder:
        root = Path(folder) / "root"
        bootstrap = ["debootstrap", "--variant=minbase", suite, str(root), archive]
        done = subprocess.run(
            bootstrap, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        log(done.stdout)
        if done.returncode:
            raise BaseError("debootstrap failed: " + " ".join(done.stdout.splitlines()[-1:]))
        (root / "etc/apt/sources.list").write_text(sources(suite, archive, security))
        slim(root)
        pack = ["tar", "--numeric-owner", "--one-file-system", "-C", str(root), "-cf", str(tar)]
        subprocess.run([*pack, "."], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("suite", nargs="?", default="bookworm")
    suite = parser.parse_args().suite
    with tempfile.TemporaryDirectory() as folder:
        tar = Path(folder) / "base.tar"
        try:
            make(suite, tar, sys.stderr.write)
        except (BaseError, OSError, subprocess.CalledProcessError) as problem:
            print(f"error: {problem}", file=sys.stderr)
            return 1
        subprocess.run(["cat", tar], check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
