#!/usr/bin/env python3
"""Gather what docker/gpu.py needs on a machine without network: archives and a manifest.

The machine has torch with CUDA, NumPy and a compiler of its own; the bundle brings Horovod's source
archive, a wheel of this package, and wheels of small packages that may be missing there. The last
line on stdout is the folder.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from horovod_wheel import PIP, WheelError, download_sdist, sha256

ROOT = Path(__file__).resolve().parents[1]
MANIFEST = "manifest.json"
LIMIT_MB = 60.0
# Besides: what builds Horovod and what it imports, then what the tests and benchmarks import. All
# are complete with what they need in turn. A group that is too much for the limit is left out.
GROUPS = (
    "setuptools<81 wheel packaging cffi pycparser cloudpickle psutil pyyaml",
    "pytest iniconfig pluggy pygments pytest-timeout hypothesis sortedcontainers",
    "tqdm joblib threadpoolctl scikit-learn",
    "numba llvmlite",
)
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (39, 34, 31, 28, 27, 24, 17, 12, 5)]
PLATFORMS += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64"]


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def say(text: str) -> None:
    print(f"gpu bundle: {text}", file=sys.stderr, flush=True)


def pip(*arguments: str) -> None:
    subprocess.run([*PIP, *arguments, "--quiet"], check=True, stdout=sys.stderr)


def download(wanted: Sequence[str], python: str, into: Path) -> None:
    """Wheels for Linux on x86-64, in the versions that this project pins."""
    target = [f"--python-version={python}", "--implementation=cp", "--only-binary=:all:"]
    target += [f"--platform={platform}" for platform in PLATFORMS]
    pins = f"--constraint={ROOT / 'docker' / 'constraints.txt'}"
    pip("download", "--no-deps", pins, *target, f"--dest={into}", *wanted)


def own_wheel(into: Path) -> None:
    """This package, from a copy: a build here would take along what an earlier one has left."""
    with tempfile.TemporaryDirectory() as name:
        for file in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / file, name)
        shutil.copytree(ROOT / "hvd_dls", Path(name) / "hvd_dls")
        pip("wheel", "--no-deps", f"--wheel-dir={into}", name)


def gather(folder: Path, python: str, limit_mb: float) -> list[str]:
    """Fill the empty folder; returns the packages that were left out."""
    download_sdist(folder, folder.with_suffix(".log"))
    folder.with_suffix(".log").unlink()
    own_wheel(folder)
    left_out: list[str] = []
    for group in map(str.split, GROUPS):
        apart = folder.with_name(f"{folder.name}.group")
        shutil.rmtree(apart, ignore_errors=True)
        download(group, python, apart)
        if size(folder) + size(apart) <= limit_mb * 1e6:
            for wheel in apart.iterdir():
                wheel.rename(folder / wheel.name)
        else:
            left_out += group
        shutil.rmtree(apart)
    return left_out


def write_manifest(folder: Path, python: str, left_out: Sequence[str]) -> None:
    files = {
        file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)}
        for file in sorted(folder.iterdir())
    }
    manifest = {"python": python, "left_out": list(left_out), "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def verified(folder: Path) -> Iterator[Path]:
    """The bundle's files, each compared with the manifest."""
    manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    for name, facts in manifest["files"].items():
        if sha256(folder / name) != facts["sha256"]:
            raise ValueError(f"{folder / name} is not the file that was gathered")
        yield folder / name


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-bundle")
    parser.add_argument("--python", default="3.12", help="the Python of that machine (3.12)")
    parser.add_argument("--limit-mb", type=float, default=LIMIT_MB, help=f"({LIMIT_MB:.0f})")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    # Made beside its place, so that what is there is whole, or what was there before.
    staged = options.out.resolve().with_name(f"{options.out.name}.partial")
    try:
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
        left_out = gather(staged, options.python, options.limit_mb)
        write_manifest(staged, options.python, left_out)
        shutil.rmtree(options.out, ignore_errors=True)
        staged.rename(options.out)
    except (WheelError, OSError, subprocess.CalledProcessError) as problem:
        say(f"error: {problem}")
        return 1
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    say(f"{size(options.out) / 1e6:.1f} MB; left out: {', '.join(left_out) or 'nothing'}")
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
