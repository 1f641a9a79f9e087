"""Bytes kept on disk for later processes, for one state of the package's sources.

Entries lie in a folder named after version and sources, ``loops-<version>-<digest>``, inside the
first of these directories that can be written to:

1. ``$NUMBA_CACHE_DIR/hvd_dls``, if that is set,
2. ``hvd_dls/__pycache__``,
3. ``$XDG_CACHE_HOME/hvd_dls/compiled`` or ``~/.cache/hvd_dls/compiled``,
4. ``hvd_dls-<user id>`` among temporary files.

Any of them may be deleted at any time.  Where none can be written to, nothing is kept.

Many processes read and write at once without locks: an entry is a file of its own that appears
complete or not at all.  Entries are code to their readers, so directories that another user may
have made are not trusted.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from hvd_dls import __version__

PACKAGE = Path(__file__).resolve().parents[1]
KEPT = 8  # folders, those of other sources included: the ones used last
_CHECKSUM = 32  # bytes at the start of a file


def digest(package: Path, *more: str) -> str:
    """Digest of all Python sources of a package, their paths, and whatever else counts.

    Raises:
        FileNotFoundError: there are no sources, as in an archive or beside compiled files only.
    """
    total = hashlib.sha256(repr(more).encode())
    files = sorted(package.rglob("*.py"))
    if not files:
        raise FileNotFoundError(f"no sources in {package}")
    for file in files:
        content = file.read_bytes()
        total.update(repr((file.relative_to(package).as_posix(), len(content))).encode())
        total.update(content)
    return total.hexdigest()[:16]


class DiskCache:
    """Entries by name, for one state of the sources.

    Args:
        digest: of everything that all entries depend on.
        chosen: the user's own directory for such things, or "".
    """

    def __init__(self, digest: str, chosen: str = "") -> None:
        self._chosen = chosen
        self._folder = f"loops-{__version__}-{digest}"
        self._marked: set[Path] = set()

    def read(self, name: str) -> bytes | None:
        """The content of an entry; None if there is none, or it is damaged."""
        for root, private in self._roots():
            if private and not _is_ours(root):
                continue
            try:
                data = (root / self._folder / name).read_bytes()
            except OSError:
                continue
            checksum, content = data[:_CHECKSUM], data[_CHECKSUM:]
            if hashlib.sha256(content).digest() == checksum:
                self._mark_as_used(root / self._folder)
                return content
        return None

    def write(self, name: str, content: bytes) -> bool:
        """Keeps an entry; returns whether there was a place for it."""
        data = hashlib.sha256(content).digest() + content
        for root, private in self._roots():
            folder = root / self._folder
            try:
                root.mkdir(0o700 if private else 0o777, parents=True, exist_ok=True)
                if private and not _is_ours(root):
                    continue
                if not folder.is_dir():
                    folder.mkdir(exist_ok=True)
                    _forget_others(root, folder)
                _write_at_once(folder / name, data)
                return True
            except OSError:  # read-only, full, no directory, deleted by another process just now
                continue
        return False

    def place(self) -> Path | None:
        """The directory that has entries of this state of the sources; None if none has."""
        for root, private in self._roots():
            if (root / self._folder).is_dir() and (not private or _is_ours(root)):
                return root / self._folder
        return None

    def _roots(self) -> Iterator[tuple[Path, bool]]:
        """Directories to try, in order, and whether each must belong to this user."""
        if self._chosen:
            yield Path(self._chosen) / "hvd_dls", False
        yield PACKAGE / "__pycache__", False
        for find in (_of_user, _temporary):
            # RuntimeError: nobody's home; FileNotFoundError: no temporary files.
            with contextlib.suppress(RuntimeError, OSError):
                yield find(), True

    def _mark_as_used(self, folder: Path) -> None:
        """For ``_forget_others``; once a process is enough."""
        if folder not in self._marked:
            self._marked.add(folder)
            with contextlib.suppress(OSError):
                os.utime(folder)


def _of_user() -> Path:
    chosen = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (chosen if chosen.is_absolute() else Path.home() / ".cache") / "hvd_dls" / "compiled"


def _temporary() -> Path:
    return Path(tempfile.gettempdir()) / f"hvd_dls-{os.geteuid()}"


def _is_ours(directory: Path) -> bool:
    """Whether nobody but this user can have put anything there."""
    try:
        found = directory.lstat()
    except OSError:
        return False
    writable = stat.S_IWGRP | stat.S_IWOTH
    ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
    return ours and not found.st_mode & writable


def _write_at_once(path: Path, data: bytes) -> None:
    """No reader sees a part of it, and of several writers one wins."""
    unfinished = path.with_name(f"{path.name}.{uuid.uuid4().hex}.unfinished")
    try:
        unfinished.write_bytes(data)
        unfinished.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise


def _forget_others(root: Path, new: Path) -> None:
    """Deletes the folders that have not been used for longest, of all but the last few."""

    def last_use(folder: Path) -> float:
        try:
            return folder.stat().st_mtime
        except OSError:  # another process was faster
            return 0.0

    others = sorted((f for f in root.glob("loops-*") if f != new), key=last_use)
    for folder in others[: max(len(others) - (KEPT - 1), 0)]:
        shutil.rmtree(folder, ignore_errors=True)
