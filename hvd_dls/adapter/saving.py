"""Writes a checkpoint: rank 0's own, and each rank's part beside it; all of it or nothing."""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

import hvd_dls
from hvd_dls.adapter.compressor import BaseCompressor
from hvd_dls.adapter.together import Together
from hvd_dls.core.checkpoint import generations
from hvd_dls.core.checkpoint.parts import header_of, part_name, write_part
from hvd_dls.errors import CheckpointError, DLSError

STATE_FILES = "state*"  # what rank 0 writes of its own


def save(
    path: str | PathLike[str],
    together: Together,
    compression: Any,
    write_state: Callable[[Path], None],
    keep: int,
    to_host: Callable[[Any], np.ndarray] = np.asarray,
) -> Path:
    """Writes a checkpoint, on all ranks at once; older ones are removed when it is complete.

    Args:
        path: folder of all checkpoints, on each rank its own or the same.
        together: the ranks.
        compression: a compressor, its class, or None.
        write_state: has rank 0 write its own files, whose names begin with ``state``, to a folder.
        keep: how many checkpoints to keep, this one included.
        to_host: makes a residual or velocity an array on the host.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: some rank could not write; on every rank alike, and older checkpoints are
            as they were.
        DLSError: called while gradients are being written, or on ranks in different steps.
    """
    path, rank = Path(path), together.rank
    models: list[Mapping[str, Any]] = []

    def begin() -> dict[str, Any]:
        _check(path, keep)
        compressor = resolved(compression)
        if compressor is not None:
            models.extend(m for m in compressor.state_dict()["models"] if m)
        told: dict[str, Any] = {"compresses": compressor is not None, "steps": _steps(models)}
        if rank == 0:
            path.mkdir(parents=True, exist_ok=True)
            told |= {"number": 1 + max(generations.numbers(path), default=-1)}
            told |= {"id": uuid.uuid4().hex}
        return told

    begun = together.do("begin", begin)
    check_compression([told["compresses"] for told in begun])
    _check_steps([told["steps"] for told in begun])
    number, facts = begun[0]["number"], {"id": begun[0]["id"], "version": hvd_dls.__version__}
    folder = generations.folder_of(path, number)

    def write() -> dict[str, int]:
        folder.mkdir(parents=True, exist_ok=True)
        own = {**facts, "rank": rank, "ranks": together.size}
        write_part(folder / part_name(rank, together.size), own, models, to_host)
        if rank == 0:
            write_state(folder)
        files = generations.sync_files(folder, STATE_FILES) if rank == 0 else {}
        generations.sync_folder(folder)
        return files

    def commit(files: dict[str, int]) -> list[int]:
        if rank != 0:
            return []
        headers = [header_of(model) for model in models]
        step = max((model["step"] for model in models), default=None)
        described = {**facts, "ranks": together.size, "step": step, "files": files}
        generations.commit(folder, {**described, "models": headers})
        kept = generations.complete(path)[-keep:]
        generations.retract(path, kept)
        return kept

    try:
        written = together.do("write", write)
        kept = together.do("commit", lambda: commit(written[0]))[0]
    except DLSError as error:
        generations.discard(path, number)
        raise CheckpointError(
            f"the checkpoint was not written: {error}; those that were there still are"
        ) from error
    generations.remove(path, kept)
    return folder


def resolved(compression: Any) -> BaseCompressor | None:
    """The compressor that a user means.

    Raises:
        DLSError: it is none.
    """
    if isinstance(compression, type) and issubclass(compression, BaseCompressor):
        compression = compression._default()
    if compression is None or isinstance(compression, BaseCompressor):
        return compression
    raise DLSError(
        f"compression={compression!r}: accepted are a DLSCompressor, class or instance, and None "
        "where nothing is compressed"
    )


def check_compression(ranks: list[bool]) -> None:
    """Whether all ranks have passed a compressor, or none.

    Raises:
        DLSError: some have, and others not.
    """
    if len(set(ranks)) > 1:
        raise DLSError(
            f"compression=None on rank {ranks.index(False)}, but not on rank {ranks.index(True)}: "
            "pass the same on all ranks"
        )


def _check(path: Path, keep: Any) -> None:
    if not isinstance(keep, int) or isinstance(keep, bool) or keep < 1:
        raise DLSError(f"keep={keep!r}: accepted is an integer >= 1")
    if generations.split(path)[1] is not None:
        raise DLSError(f"{path} is a single checkpoint's folder: pass the one that it is in")


def _steps(models: list[Mapping[str, Any]]) -> dict[str, list[int]]:
    """In which step each model is, by what it is recognised by."""
    steps: dict[str, list[int]] = {}
    for model in models:
        names = [name for name, _ in model["parameters"]]
        entries = sum(math.prod(shape) for _, shape in model["parameters"])
        what = f"{len(names)} layers from {names[0]!r} on, {entries} parameters"
        steps.setdefault(what, []).append(model["step"])
    return steps


def _check_steps(ranks: list[dict[str, list[int]]]) -> None:
    """Whether ranks that train the same model have all ended the same step of it."""
    first: dict[str, tuple[int, list[int]]] = {}
    for rank, steps in enumerate(ranks):
        for what, now in steps.items():
            other, theirs = first.setdefault(what, (rank, now))
            if theirs != now:
                raise DLSError(
                    f"the model of {what} has ended step {theirs} on rank {other} and step {now} "
                    f"on rank {rank}: save a checkpoint after the same step on all ranks"
                )
