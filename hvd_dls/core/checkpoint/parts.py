"""A rank's part of a checkpoint: one file in NumPy's own format (.npz, without pickles).

Whoever has NumPy can read it: ``numpy.load(file)``.  "header" holds JSON in uint8; the other arrays
are "<model>/residuals/<layer>" and so on, for those of ``ARRAYS`` that there are.  Each array has a
checksum.
"""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hvd_dls.core.checkpoint.redistribution import ARRAYS
from hvd_dls.core.wire.dealing import places_of
from hvd_dls.errors import CheckpointError

FORMAT = 1  # of parts and manifests
KEPT = "kept"  # by owners, in the state of a session with exchange="sparse_allreduce"


def part_name(rank: int, size: int) -> str:
    """Name of a rank's file."""
    return f"rank-{rank:05}-of-{size:05}.npz"


def header_of(model: Mapping[str, Any]) -> dict[str, Any]:
    """A model's state as JSON can hold it: without arrays, but with their names and lengths."""
    header = {key: _plain(value) for key, value in model.items() if key not in (*ARRAYS, KEPT)}
    if KEPT in model:
        header[KEPT] = {}  # it is in the residuals: see ``write_part``
    for part in _parts_of(model):
        header[part] = {name: list(array.shape) for name, array in model[part].items()}
    return header


def _parts_of(model: Mapping[str, Any]) -> list[str]:
    return [part for part in ARRAYS if part in model]


def _with_kept(model: Mapping[str, Any], to_host: Callable[[Any], np.ndarray]) -> Mapping[str, Any]:
    """The same with what owners have kept in the residuals: any number of ranks can load that."""
    if not model.get(KEPT):
        return model
    residuals = dict(model["residuals"])
    for key, kept in model[KEPT].items():
        name, piece = key.rsplit("@", 1)
        whole = np.array(to_host(residuals[name]))
        whole[places_of(len(whole), piece)] += to_host(kept)
        residuals[name] = whole
    return {**model, "residuals": residuals}


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


def write_part(
    path: Path,
    facts: Mapping[str, Any],
    models: list[Mapping[str, Any]],
    to_host: Callable[[Any], np.ndarray] = np.asarray,
) -> None:
    """Writes a rank's states, through to the disk.

    Args:
        path: of the file.
        facts: what else the header says.
        models: each model's state.
        to_host: makes a residual or velocity an array on the host.

    Raises:
        OSError: it cannot be written.
    """
    arrays: dict[str, np.ndarray] = {}
    models = [_with_kept(model, to_host) for model in models]
    for number, model in enumerate(models):
        for part in _parts_of(model):
            for name, array in model[part].items():
                arrays[f"{number}/{part}/{name}"] = to_host(array)
    header = {"format": FORMAT, **facts, "models": [header_of(model) for model in models]}
    arrays["header"] = np.frombuffer(json.dumps(header).encode(), np.uint8)
    with path.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
        file.flush()
        os.fsync(file.fileno())


class Part:
    """A rank's file, open for reading; for ``with``.

    Attributes:
        header: what it says of itself.

    Raises:
        CheckpointError: the file is missing, damaged or something else.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._raw = path.open("rb")
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing") from None
        except OSError as error:
            raise damaged(path, error) from error
        try:
            self._file = np.load(self._raw, allow_pickle=False)
            self.header: dict[str, Any] = json.loads(self._file["header"].tobytes())
            if (version := self.header["format"]) != FORMAT:
                raise CheckpointError(
                    f"{path} has format {version}; this version of hvd_dls reads {FORMAT}"
                )
        except CheckpointError:
            self._raw.close()
            raise
        except (*_DAMAGE, LookupError, AttributeError, TypeError) as error:
            self._raw.close()
            raise damaged(path, error) from error

    def models(self) -> list[dict[str, Any]]:
        """Each model's state; arrays are read when they are asked for."""
        return [
            {**model, **{p: _Arrays(self, f"{number}/{p}/", model[p]) for p in _parts_of(model)}}
            for number, model in enumerate(self.header["models"])
        ]

    def read(self, key: str) -> np.ndarray:
        """An array."""
        try:
            array: np.ndarray = self._file[key]
        except (*_DAMAGE, LookupError) as error:
            raise damaged(self._path, error) from error
        return array

    def __enter__(self) -> Part:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._raw.close()


_DAMAGE = (zipfile.BadZipFile, zlib.error, ValueError, EOFError, OSError, NotImplementedError)


def damaged(path: Path, error: Exception) -> CheckpointError:
    """What to raise of a file that cannot be read."""
    return CheckpointError(f"{path} cannot be read: {type(error).__name__}: {error}")


class _Arrays(Mapping[str, np.ndarray]):
    """Arrays of a part by layer, read when they are asked for."""

    def __init__(self, part: Part, prefix: str, names: Mapping[str, Any]) -> None:
        self._part, self._prefix, self._names = part, prefix, names

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._names:
            raise KeyError(name)
        return self._part.read(self._prefix + name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
