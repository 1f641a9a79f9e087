"""Whether a saved state belongs to a model, its options and its number of ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from hvd_dls.errors import StateMismatchError

STATE_VERSION = 2
# Options that may differ between saving and loading.
FREE_OPTIONS = (
    "measure_every",
    "bucket_bytes",
    "threads",
    "values",
    "index_code",
    "nonfinite",
    "clip_norm",
    "clip_value",
)


def check_state(state: Mapping[str, Any], own: Mapping[str, Any], ratios: int) -> None:
    """Compares a saved state with the one that the session would save now.

    Args:
        state: as saved.
        own: the session's.
        ratios: the least length of the saved ratios.

    Raises:
        StateMismatchError: naming the first difference.
    """
    if state.get("version") != STATE_VERSION:
        raise StateMismatchError(
            f"saved state has version {state.get('version')}, expected {STATE_VERSION}"
        )
    if missing := own.keys() - state.keys():
        raise StateMismatchError(f"the saved state lacks {', '.join(sorted(missing))}")
    for option, value in own["config"].items():
        saved = state["config"].get(option)
        if saved != value and option not in FREE_OPTIONS:
            raise StateMismatchError(f"saved with {option}={saved!r}, but it is {value!r} now")
    if state["world_size"] != own["world_size"]:
        raise StateMismatchError(
            f"saved by one of {state['world_size']} ranks, but there are {own['world_size']} now"
        )
    _check_layers(dict(state["layers"]), dict(own["layers"]))
    if len(state["ratios"]) < ratios:
        raise StateMismatchError(f"the saved ratios have only {len(state['ratios'])} numbers")
    for part in ("thresholds", "norms", "residuals", "velocities"):
        if len(state[part]) != len(own[part]):
            raise StateMismatchError(
                f"the saved state has {len(state[part])} {part}, expected {len(own[part])}"
            )
    for part in ("residuals", "velocities"):
        for name, array in own[part].items():
            saved_shape = np.shape(state[part].get(name, ()))
            if saved_shape != array.shape:
                raise StateMismatchError(
                    f"layer {name!r}: {part} saved in shape {saved_shape}, expected {array.shape}"
                )


def _check_layers(saved: Mapping[str, list[Any]], own: Mapping[str, list[Any]]) -> None:
    for name in saved:
        if name not in own:
            raise StateMismatchError(f"saved with a compressed layer {name!r}, not there now")
    for name, shape in own.items():
        if name not in saved:
            raise StateMismatchError(f"compressed layer {name!r} is not in the saved state")
        if list(saved[name]) != shape:
            raise StateMismatchError(
                f"layer {name!r} was saved as {list(saved[name])}, it is {shape} now"
            )
    if list(saved) != list(own):
        raise StateMismatchError("the saved layers stand in another order")
