"""``save_checkpoint`` and ``load_checkpoint`` for ``horovod.torch``."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

import horovod.torch as hvd
import numpy as np
import torch

from hvd_dls.adapter.loading import REFUSE, find
from hvd_dls.adapter.saving import resolved, save
from hvd_dls.adapter.together import Together
from hvd_dls.adapter.world import World
from hvd_dls.core.checkpoint.redistribution import ARRAYS
from hvd_dls.errors import CheckpointError, DLSError
from hvd_dls.torch.exchange import gather

_FILE = "state.pt"


def save_checkpoint(
    path: str | PathLike[str], state: Any, compression: Any = None, *, keep: int = 2
) -> Path:
    """Saves a checkpoint: rank 0's state, and every rank's residuals beside it.

    To be called on all ranks, after the same step.  It is complete or not there: whatever ends the
    job meanwhile, the checkpoint before can be loaded.

    Args:
        path: folder of all checkpoints; it is made.  Where ranks have disks of their own, each
            writes its part to its own.
        state: what rank 0 saves, as ``torch.save`` takes it and ``torch.load(weights_only=True)``
            loads it: state dicts, tensors, numbers, strings.  Other ranks' is not looked at.
        compression: the DLSCompressor, instance or class; None saves ``state`` alone.
        keep: how many checkpoints to keep, this one included.

    Returns:
        The checkpoint's own folder; rank 0's state in it is ``state.pt``.

    Raises:
        CheckpointError: a rank could not write; on every rank alike.
        DLSError: gradients are being written, ranks are in different steps, or an argument is not
            accepted; on every rank alike.

    Example:
        >>> save_checkpoint(
        ...     "checkpoints",
        ...     {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch},
        ...     compression)
    """

    def write(folder: Path) -> None:
        if state is None:
            raise DLSError("state=None on rank 0: pass what it is to save")
        torch.save(state, folder / _FILE)
        try:
            torch.load(folder / _FILE, weights_only=True, mmap=True, map_location="cpu")
        except Exception as error:
            lines = str(error).strip().splitlines()  # the first is mostly torch's advice
            told = next((line for line in lines if "Unsupported" in line), lines[0]).strip()
            raise CheckpointError(
                "state could be saved, but not loaded with weights_only=True: pass tensors, "
                f"numbers, strings, and of all else its state_dict() ({told})"
            ) from error

    return save(path, _everyone(), compression, write, keep, _to_host)


def load_checkpoint(
    path: str | PathLike[str],
    compression: Any = None,
    *,
    missing: str = REFUSE,
    map_location: Any = "cpu",
) -> Any:
    """Loads the newest complete checkpoint, on all ranks; on any number of them.

    Gives residuals and ratios to the compressor, and rank 0's state to every rank, also where the
    others do not see its file.  On another number of ranks, or with ``hierarchical`` changed,
    residuals and momentum are redistributed; see docs/checkpoints.md.

    Args:
        path: folder of checkpoints, or a single one's.
        compression: the DLSCompressor, instance or class, before its first step or later; None
            leaves residuals out.
        missing: "zeros" lets residuals be zero whose file is missing; "refuse" does not.
        map_location: as ``torch.load`` takes it.

    Returns:
        The state; None if there is no complete checkpoint.

    Raises:
        CheckpointError: a file is missing or damaged; on every rank alike.
        StateMismatchError: it was saved with other options or layers; on every rank alike, before
            anything has changed.  Layers are known with the first gradient: then, if it has not
            come in yet.
    """
    together = _everyone()
    found = find(path, together, compression, missing)
    if found is None:
        return None
    state = together.do_and_keep(
        "load",
        lambda: torch.load(found.folder / _FILE, map_location=map_location, weights_only=True),
    )
    compressor = resolved(compression)
    if compressor is not None and found.state is not None:
        models = [_as_tensors(model) for model in found.state["models"]]
        compressor.load_state_dict({**found.state, "models": models})
    return state


class _Everyone(Together):
    def _gather(self, name: str, array: np.ndarray) -> np.ndarray:
        return gather(name, array, hvd.global_process_set)


def _everyone() -> _Everyone:
    return _Everyone(
        World(
            rank=hvd.rank(),
            size=hvd.size(),
            local_size=hvd.local_size(),
            set_id=0,
            global_rank=hvd.rank(),
            local_rank=hvd.local_rank(),
        )
    )


def _to_host(array: Any) -> np.ndarray:
    return torch.as_tensor(array).detach().cpu().numpy()


def _as_tensors(model: dict[str, Any]) -> dict[str, Any]:
    """As ``DLSCompressor.state_dict`` has them, which may be asked for before the first step."""
    parts = [part for part in ARRAYS if part in model]
    tensors = {p: {n: torch.as_tensor(a) for n, a in model[p].items()} for p in parts}
    return {**model, **tensors}
