"""Whether a saved state belongs to a model, its options and its rank, and is sound."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from hvd_dls.core.balancing.attendance import PATIENCE
from hvd_dls.core.checkpoint.redistribution import OF_ADAM
from hvd_dls.errors import StateMismatchError

STATE_VERSION = 3
_OLDEST = 2  # that is still read
_NEW = {"rank", "groups", "parameters"}  # what it did not have
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
    "clip_global_norm",
    "adam_eps",
)
_MAY_LACK = {"usual_shares"}  # what only some sessions save, and any can begin without
_BEFORE = {"exchange": "allgather"}  # options that older states do not name


def check_state(
    state: Mapping[str, Any],
    own: Mapping[str, Any],
    sizes: np.ndarray,
    residuals: Collection[str],
) -> Mapping[str, Any]:
    """Compares a saved state with the one that the session would save now.

    Args:
        state: as saved, by this version or by 0.1 of hvd_dls.
        own: the session's.
        sizes: (L,) entries of each compressed layer.
        residuals: stable names of the layers whose residuals have to be there.

    Returns:
        The state, in the present version.

    Raises:
        StateMismatchError: naming the first difference, or what is wrong.
    """
    with damage_named():
        return _checked(state, own, sizes, residuals)


@contextmanager
def damage_named() -> Iterator[None]:
    """Has whatever goes wrong with a state that is damaged end in a StateMismatchError."""
    try:
        yield
    except StateMismatchError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise StateMismatchError(
            f"the saved state is damaged: {type(error).__name__}: {error}"
        ) from error


def _checked(
    state: Mapping[str, Any],
    own: Mapping[str, Any],
    sizes: np.ndarray,
    residuals: Collection[str],
) -> Mapping[str, Any]:
    if not isinstance(state, Mapping) or state.get("version") not in (_OLDEST, STATE_VERSION):
        version = state.get("version") if isinstance(state, Mapping) else state
        raise StateMismatchError(f"saved state has version {version}, expected {STATE_VERSION}")
    old = state["version"] == _OLDEST
    if missing := own.keys() - state.keys() - _MAY_LACK - set(OF_ADAM) - (_NEW if old else set()):
        raise StateMismatchError(f"the saved state lacks {', '.join(sorted(missing))}")
    if old:
        state = _upgraded(state, own)
    check_options(state["config"], own["config"])
    if state["world_size"] != own["world_size"]:
        raise StateMismatchError(
            f"saved by one of {state['world_size']} ranks, but there are {own['world_size']} now"
        )
    if list(state["groups"]) != own["groups"]:
        raise StateMismatchError(
            f"saved with {list(state['groups'])} ranks on each host, but there are {own['groups']} "
            "now: residuals are those of a host, shared out among its ranks"
        )
    if state["rank"] != own["rank"]:
        raise StateMismatchError(
            f"saved by rank {state['rank']}, but this is rank {own['rank']}: residuals are each "
            "rank's own, so each rank loads the file that it saved"
        )
    _check_layers(dict(state["layers"]), dict(own["layers"]))
    _check_arrays(state, own, residuals)
    _check_numbers(state, own, sizes)
    return state


def check_options(
    saved: Mapping[str, Any], own: Mapping[str, Any], free: Sequence[str] = ()
) -> None:
    """Compares options, but those that may differ, and ``free``.

    Raises:
        StateMismatchError: naming the first that differs.
    """
    for option, value in own.items():
        before = saved.get(option, _BEFORE.get(option))
        if before != value and option not in (*FREE_OPTIONS, *free):
            raise StateMismatchError(f"saved with {option}={before!r}, but it is {value!r} now")


def _upgraded(state: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """A state of version 2, which knew no rank, no hosts, and not which layers had stayed away."""
    layers, ratios = len(state["layers"]), np.asarray(state["ratios"], np.int64)
    cut = 2 + 2 * layers
    attendance = np.repeat([0, PATIENCE, 1], layers)
    return {
        **state,
        "version": STATE_VERSION,
        "config": {**state["config"], "hierarchical": False},
        "groups": [1] * state["world_size"],
        "rank": own["rank"],
        "parameters": own["parameters"],
        "ratios": np.concatenate([ratios[:cut], attendance, ratios[cut:]]),
    }


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


def _check_arrays(
    state: Mapping[str, Any], own: Mapping[str, Any], needed_residuals: Collection[str]
) -> None:
    """Residuals and velocities: of these layers, as long, and finite.

    Layers that go dense may have residuals, too: of times when they did not.
    """
    lengths = {name: math.prod(shape) for name, shape in own["parameters"]}
    parts = {"residuals": needed_residuals, "velocities": own["velocities"]}
    if OF_ADAM[0] in own:
        parts |= {part: own[part] for part in OF_ADAM}
    for part, needed in parts.items():
        there = state[part]
        for name in needed:
            if name not in there:
                raise StateMismatchError(f"layer {name!r}: the saved state lacks its {part}")
        for name, array in there.items():
            if name not in (lengths if part == "residuals" else needed):
                raise StateMismatchError(f"{part} of layer {name!r} are saved, not there now")
            saved = np.asarray(array)
            length = 2 if part == "moment_weights" else lengths[name]
            if saved.shape != (length,):
                raise StateMismatchError(
                    f"layer {name!r}: {part} saved in shape {saved.shape}, expected ({length},)"
                )
            if not np.issubdtype(saved.dtype, np.floating):
                raise StateMismatchError(f"layer {name!r}: {part} saved as {saved.dtype}")
            if not np.isfinite(saved).all():
                where = int(np.argmin(np.isfinite(saved)))
                raise StateMismatchError(
                    f"layer {name!r}: {part} hold {saved[where]} at entry {where}, expected finite "
                    "numbers"
                )
            if part in OF_ADAM and (lowest := saved.min(initial=0)) < 0:
                raise StateMismatchError(
                    f"layer {name!r}: {part} hold {lowest}, expected numbers >= 0"
                )


def _check_numbers(state: Mapping[str, Any], own: Mapping[str, Any], sizes: np.ndarray) -> None:
    """Thresholds, norms, loss scale, step, and how many entries each layer sends."""
    names = [name for name, _ in own["layers"]]
    for part in ("thresholds", "norms"):
        values = np.asarray(state[part], np.float64)
        if values.shape != (len(own[part]),):
            raise StateMismatchError(
                f"the saved state has {values.size} {part}, expected {len(own[part])}"
            )
        good = np.isfinite(values) & (values >= 0)
        if not good.all():
            where = int(np.argmin(good))
            raise StateMismatchError(
                f"layer {names[where]!r}: {part} hold {values[where]}, expected a finite number "
                ">= 0"
            )
    for name, share in state.get("usual_shares", {}).items():
        if not 0 <= share <= 1:
            raise StateMismatchError(
                f"layer {name!r}: its usual share of the squares of the global norm is {share} in "
                "the saved state, expected a number in [0, 1]"
            )
    loss_scale = state["loss_scale"]
    if not (isinstance(loss_scale, (int, float)) and 0 < loss_scale < math.inf):
        raise StateMismatchError(f"the saved loss_scale is {loss_scale}, expected a number > 0")
    layers, ratios = len(sizes), np.asarray(state["ratios"])
    rest = ratios.size - (2 + 5 * layers)  # two numbers for each bucket
    if ratios.dtype.kind not in "iu" or ratios.ndim != 1 or rest < 0 or rest % 2:
        raise StateMismatchError(
            f"the saved ratios are {ratios.size} numbers of {ratios.dtype}, expected "
            f"{2 + 5 * layers} whole numbers, and two for each bucket"
        )
    if ratios[0] < 0 or ratios[0] != state["step"]:
        raise StateMismatchError(f"saved in step {state['step']}, with ratios of {ratios[0]}")
    for row in range(2):  # what is sent, and what Algorithm 2 would send
        k = ratios[2 + row * layers : 2 + (row + 1) * layers]
        good = (k >= 0) & (k <= sizes)
        if not good.all():
            where = int(np.argmin(good))
            raise StateMismatchError(
                f"layer {names[where]!r}: sends {k[where]} entries in the saved state, but has "
                f"{sizes[where]}"
            )
    away, patience, seen = ratios[2 + 2 * layers : 2 + 5 * layers].reshape(3, layers)
    good = (away >= 0) & (patience > 0) & (seen >= 0) & (seen <= 1)
    if not good.all():
        where = int(np.argmin(good))
        raise StateMismatchError(
            f"layer {names[where]!r}: stayed away for {away[where]} of {patience[where]} steps in "
            f"the saved state, and came before: {seen[where]}"
        )
    means = ratios[len(ratios) - rest // 2 :].astype(np.int64).view(np.float64)
    if not np.isfinite(means).all():
        raise StateMismatchError(f"the saved means of the buckets' entries are {means.tolist()}")
