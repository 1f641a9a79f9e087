"""Complete sets of files, one after the other: the newest counts, and an unfinished one never.

    checkpoints/
      checkpoint-00000007/
        state...                       rank 0's, in the framework's format
        rank-00000-of-00002.npz        each rank's part
        rank-00001-of-00002.npz
        manifest.json                  written last, when all else is on the disk

Where ranks have disks of their own, each has this folder with its own part in it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from hvd_dls.core.checkpoint.parts import FORMAT, damaged
from hvd_dls.errors import CheckpointError

_NAME = re.compile(r"checkpoint-(\d{8,})")
_MANIFEST = "manifest.json"


def folder_of(path: Path, number: int) -> Path:
    """The folder of a generation."""
    return path / f"checkpoint-{number:08}"


def split(path: Path) -> tuple[Path, int | None]:
    """A folder of checkpoints, and which one, if the path names it."""
    name = _NAME.fullmatch(path.name)
    return (path.parent, int(name[1])) if name else (path, None)


def numbers(path: Path) -> list[int]:
    """All generations there, ascending, finished or not."""
    if not path.exists():
        return []
    names = (_NAME.fullmatch(entry.name) for entry in path.iterdir())
    return sorted(int(name[1]) for name in names if name)


def complete(path: Path) -> list[int]:
    """Those that are finished, ascending."""
    return [n for n in numbers(path) if (folder_of(path, n) / _MANIFEST).exists()]


def manifest_of(folder: Path) -> dict[str, Any] | None:
    """What a generation is made of; None if it is not finished, or not here.

    Raises:
        CheckpointError: it cannot be read, or is of another version.
    """
    path = folder / _MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
        version = manifest["format"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise damaged(path, error) from error
    if version != FORMAT:
        raise CheckpointError(
            f"{path} has format {version}; this version of hvd_dls reads {FORMAT}"
        )
    return manifest


def commit(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Makes a generation the newest: all of it is on the disk, or it is not there.

    Raises:
        OSError: the manifest cannot be written.
    """
    unfinished = folder / f"{_MANIFEST}.unfinished"
    with unfinished.open("w") as file:
        json.dump({"format": FORMAT, **manifest}, file)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(folder)
    sync_folder(folder.parent)
    unfinished.replace(folder / _MANIFEST)
    sync_folder(folder)


def sync_files(folder: Path, pattern: str) -> dict[str, int]:
    """Brings files to the disk; returns the size of each, by name."""
    sizes = {}
    for path in sorted(folder.glob(pattern)):
        with path.open("rb+") as file:
            os.fsync(file.fileno())
            sizes[path.name] = os.fstat(file.fileno()).st_size
    return sizes


def sync_folder(folder: Path) -> None:
    """Brings the names in a folder to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def retract(path: Path, kept: Collection[int]) -> None:
    """Lets finished generations but those that are kept be unfinished."""
    with contextlib.suppress(OSError):
        for number in complete(path):
            if number not in kept:
                (folder_of(path, number) / _MANIFEST).unlink(missing_ok=True)


def discard(path: Path, number: int) -> None:
    """Removes what was written of a generation, as far as it can be."""
    folder = folder_of(path, number)
    with contextlib.suppress(OSError):
        (folder / _MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def remove(path: Path, kept: Collection[int]) -> None:
    """Removes all generations but those that are kept; others may be doing the same."""
    with contextlib.suppress(OSError):
        for number in numbers(path):
            if number not in kept:
                shutil.rmtree(folder_of(path, number), ignore_errors=True)
