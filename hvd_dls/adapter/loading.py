"""Reads a checkpoint: on all ranks or on none, and on more or fewer than those that wrote it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hvd_dls.adapter.hosts import groups_of, row_of
from hvd_dls.adapter.saving import check_compression, resolved
from hvd_dls.adapter.states import STATE_VERSION
from hvd_dls.adapter.together import Together
from hvd_dls.adapter.world import World, is_elastic, within_elastic_run
from hvd_dls.config import AUTO, DLSConfig
from hvd_dls.core.checkpoint import generations
from hvd_dls.core.checkpoint.parts import Part, part_name
from hvd_dls.core.checkpoint.redistribution import ARRAYS, redistributed, wanted
from hvd_dls.core.session.state import check_options
from hvd_dls.errors import CheckpointError, DLSError

_log = logging.getLogger("hvd_dls")

REFUSE, ZEROS = "refuse", "zeros"  # what becomes of parts that are missing
_OUTSIDE = (
    "load_checkpoint outside of hvd.elastic.run: it is a call of all ranks, so a worker that comes "
    "while the others train waits here for ever; call it in the function that is run, where "
    "training begins (docs/elastic.md)"
)
_CHUNK = 64 << 20  # bytes of a file that travel together


class Found(NamedTuple):
    """A checkpoint that was found.

    Attributes:
        folder: with rank 0's own files, on every rank.
        state: for the compressor's ``load_state_dict``; None if there is nothing for it.
    """

    folder: Path
    state: dict[str, Any] | None


def find(
    path: str | PathLike[str], together: Together, compression: Any, missing: str = REFUSE
) -> Found | None:
    """Finds the newest checkpoint, or the one that the path names, on all ranks at once.

    Nothing changes yet, but that ranks which do not see rank 0's files have a copy now.

    Args:
        path: a folder of checkpoints, or one of them.
        together: the ranks.
        compression: a compressor, its class, or None to leave its state out.
        missing: what to do where a rank's part is missing: "refuse", or "zeros".

    Returns:
        None if there is no complete one.

    Raises:
        CheckpointError: a file is missing or damaged; on every rank alike.
        StateMismatchError: it was saved with other options; on every rank alike.
    """
    if is_elastic() and not within_elastic_run():
        _log.warning(_OUTSIDE)
    path, named = generations.split(Path(path))

    def look() -> dict[str, Any]:
        if missing not in (REFUSE, ZEROS):
            raise DLSError(f"missing={missing!r}: accepted are {REFUSE!r} and {ZEROS!r}")
        told: dict[str, Any] = {"compresses": resolved(compression) is not None}
        told["host"] = row_of(together.world).tolist()
        return told | {"found": newest() if together.rank == 0 else None}

    def newest() -> tuple[int, dict[str, Any]] | None:
        number = max(generations.complete(path), default=None) if named is None else named
        if number is None:
            return None
        manifest = generations.manifest_of(generations.folder_of(path, number))
        if manifest is None:
            raise CheckpointError(
                f"{generations.folder_of(path, number)} is not there, or no complete checkpoint: "
                f"pass {path} for the newest one in it"
            )
        return number, manifest

    everyone = together.do("find", look)
    check_compression([told["compresses"] for told in everyone])
    if everyone[0]["found"] is None:
        return None
    number, manifest = everyone[0]["found"]
    folder = generations.folder_of(path, number)
    compressor = resolved(compression)
    states: list[dict[str, Any]] = []

    def read() -> bool:
        if compressor is not None:
            rows = np.array([told["host"] for told in everyone], np.uint8)
            sizes = _group_sizes(rows, together.world, compressor.config)
            reader = _Reader(folder, manifest, together, compressor.config, sizes, missing)
            states.extend(reader.models())
        own = generations.manifest_of(folder)
        return own is not None and own["id"] == manifest["id"]

    sees = together.do("read", read)
    if not all(sees):
        _copy(folder, manifest["files"], sees[together.rank], together)
    if compressor is None:
        return Found(folder, None)
    if not states:
        _log.info("%s was saved without compression: residuals begin at zero", folder)
        return Found(folder, None)
    return Found(folder, {"version": STATE_VERSION, "models": states})


def _group_sizes(rows: np.ndarray, world: World, config: DLSConfig) -> list[int]:
    """Ranks that send as one."""
    if not config.hierarchical or world.size == 1:
        return [1] * world.size
    return list(groups_of(rows, world)[0].sizes)


class _Reader:
    """Makes a rank's state out of the parts of a checkpoint.

    Args:
        folder: of the checkpoint.
        manifest: rank 0's.
        together: the ranks.
        config: the compressor's options.
        sizes: of groups of ranks that send as one.
        missing: see ``find``.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Mapping[str, Any],
        together: Together,
        config: DLSConfig,
        sizes: Sequence[int],
        missing: str,
    ) -> None:
        self._folder, self._manifest, self._missing = folder, manifest, missing
        self._rank, self._size, self._sizes = together.rank, together.size, list(sizes)
        self._config = config
        self._before: int = manifest["ranks"]
        self._open: dict[int, list[dict[str, Any]] | None] = {}

    def models(self) -> list[dict[str, Any]]:
        """The states of all models, with their arrays.

        Raises:
            CheckpointError: a part is missing or damaged.
            StateMismatchError: it was saved with other options.
        """
        own = self._config.as_plain()
        for model in self._manifest["models"]:
            free = ("hierarchical", "exchange") if own["exchange"] == AUTO else ("hierarchical",)
            check_options(model["config"], own, free)  # what "auto" comes to, the first step tells
        with ExitStack() as stack:
            self._stack = stack
            models = self._part(self._rank) if self._before == self._size else None
            here = models is not None
            if models is None:
                models = [_without_arrays(model) for model in self._manifest["models"]]
            return [self._state(models, position, here) for position in range(len(models))]

    def _state(self, models: list[dict[str, Any]], position: int, here: bool) -> dict[str, Any]:
        model = models[position]
        sizes, hosts = list(model["groups"]), self._config.hierarchical
        of_set = model["world_size"] != self._before
        same = self._before == self._size and (
            of_set or (sizes == self._sizes and model["config"]["hierarchical"] == hosts)
        )
        if same and here:
            return {**model, **{part: dict(model[part]) for part in ARRAYS if part in model}}
        if of_set:
            raise CheckpointError(
                f"{self._folder}: a model was trained by a process set of {model['world_size']} of "
                f"{self._before} ranks: load it on as many ranks, each with its part"
            )
        if same:  # but its part is missing
            return redistributed({self._rank: model}, self._size, self._rank)
        like = [m["parameters"] for m in models[:position]].count(model["parameters"])
        states = {
            old: self._model_of(old, model, like)
            for old in wanted(sizes, self._size, self._rank, hosts)
        }
        return redistributed(states, self._size, self._rank, hosts)

    def _model_of(self, old: int, model: dict[str, Any], like: int) -> dict[str, Any]:
        """An old rank's state of a model; ``like`` others that are alike come before it."""
        models = self._part(old)
        if models is None:
            return _without_arrays(model)
        alike = [m for m in models if m["parameters"] == model["parameters"]]
        if len(alike) <= like:
            raise CheckpointError(
                f"{self._folder / part_name(old, self._before)} lacks the model with layer "
                f"{model['parameters'][0][0]!r}"
            )
        return alike[like]

    def _part(self, old: int) -> list[dict[str, Any]] | None:
        """An old rank's states; None if its part is missing and need not be there."""
        if old not in self._open:
            self._open[old] = self._opened(old)
        return self._open[old]

    def _opened(self, old: int) -> list[dict[str, Any]] | None:
        path = self._folder / part_name(old, self._before)
        if not path.exists():
            if self._missing == ZEROS:
                _log.warning("%s is missing: its residuals count as zeros", path)
                return None
            raise CheckpointError(
                f"{path} is missing, with residuals of rank {old} of {self._before}: copy it there "
                "from the disk of that rank, or pass missing='zeros' to go on without them"
            )
        part = self._stack.enter_context(Part(path))
        for what, value in (("id", self._manifest["id"]), ("rank", old)):
            if part.header.get(what) != value:
                raise CheckpointError(
                    f"{path} has {what} {part.header.get(what)!r}, expected {value!r}: it belongs "
                    "to another checkpoint"
                )
        return part.models()


def _without_arrays(model: Mapping[str, Any]) -> dict[str, Any]:
    return {**model, **{part: {} for part in ARRAYS if part in model}}


def _copy(folder: Path, files: Mapping[str, int], sees: bool, together: Together) -> None:
    """Hands rank 0's files to ranks that do not see them; each has them in its own folder then."""
    problem: Exception | None = None
    for name, size in files.items():
        path = folder / Path(name).name
        for start in range(0, size, _CHUNK):
            chunk = np.empty(0, np.uint8)
            try:
                if together.rank == 0 and problem is None:
                    chunk = np.fromfile(path, np.uint8, _CHUNK, offset=start)
            except OSError as error:
                problem = error
            chunk = together.gather("copy", chunk)
            try:
                if not sees and problem is None:
                    folder.mkdir(parents=True, exist_ok=True)
                    with path.open("r+b" if start else "wb") as file:
                        file.seek(start)
                        file.write(chunk.tobytes())
            except OSError as error:
                problem = error

    def report() -> None:
        if problem is not None:
            raise problem

    together.do("copied", report)
