"""A state of other ranks or another layout, as a session takes it: who holds what is known here."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from hvd_dls.core.checkpoint.redistribution import ARRAYS, MOVED, OF_ADAM
from hvd_dls.errors import StateMismatchError

_LAYOUT = ("hierarchical", "exchange")  # options that say who holds what


def fitted(
    state: Mapping[str, Any],
    own: Mapping[str, Any],
    owned: Collection[str],
    fresh_ratios: np.ndarray,
    averages: bool,
) -> dict[str, Any]:
    """Fills in and leaves out what makes the difference between two layouts.

    A layer that is compressed on one of them only takes its residual along: it is added to the
    layer's next gradient.  Ratios begin anew then.

    Args:
        state: from ``redistributed``.
        own: what the session would save now.
        owned: stable names of the layers whose residuals this rank has.
        fresh_ratios: ``Controller.state()`` for the state's step, where others were compressed.
        averages: whether Horovod divides sums over ranks by their number.

    Returns:
        A state that only ``check_state`` can still refuse.

    Raises:
        StateMismatchError: it is of another number of ranks, or of other layers.
    """
    if state["world_size"] != own["world_size"]:
        raise StateMismatchError(
            f"redistributed to {state['world_size']} ranks, but the model trains on "
            f"{own['world_size']}: a model whose ranks are a process set loads what as many saved"
        )
    if [[name, list(shape)] for name, shape in state["parameters"]] != own["parameters"]:
        raise StateMismatchError("the saved state is of other layers, or in another order")
    lengths = {name: math.prod(shape) for name, shape in own["parameters"]}
    factor = 1.0 if averages else float(state[MOVED]["factor"])
    saved_layers, layers = dict(state["layers"]), dict(own["layers"])
    arrays = {part: _scaled(state[part], factor) for part in ARRAYS if part in state}
    leftovers = {n: array for n, array in arrays["residuals"].items() if n not in layers}
    saved = list(map(list, state["layers"]))
    return {
        **state,
        "rank": own["rank"],
        "groups": own["groups"],
        "config": {**state["config"], **{option: own["config"][option] for option in _LAYOUT}},
        "layers": [[name, saved_layers.get(name, shape)] for name, shape in own["layers"]],
        "ratios": _ratios(state, own, fresh_ratios, saved),
        "thresholds": _by_name(state, own, "thresholds", factor),
        "norms": _by_name(state, own, "norms", factor),
        "residuals": {n: _or_zeros(arrays["residuals"], n, lengths) for n in owned} | leftovers,
        "velocities": {n: _or_zeros(arrays["velocities"], n, lengths) for n in own["velocities"]},
        **_moments(arrays, own, lengths),
        **({"kept": {}} if "kept" in own else {}),  # it is in the residuals
    }


def _moments(
    arrays: Mapping[str, Any], own: Mapping[str, Any], lengths: Mapping[str, int]
) -> dict[str, Any]:
    """Adam's, of each layer that has some here; where it had none, as at the start."""
    sizes = {"second_moments": lengths, "moment_weights": dict.fromkeys(lengths, 2)}
    return {
        part: {name: _or_zeros(arrays[part], name, sizes[part]) for name in own[part]}
        for part in OF_ADAM
        if part in arrays and part in own
    }


def _ratios(
    state: Mapping[str, Any], own: Mapping[str, Any], fresh: np.ndarray, saved: list[Any]
) -> np.ndarray:
    if [name for name, _ in saved] != [name for name, _ in own["layers"]]:
        return fresh
    ratios = np.asarray(state["ratios"], np.int64)
    same_buckets = list(state[MOVED]["groups"]) == own["groups"]
    return ratios if same_buckets else ratios[: 2 + 5 * len(own["layers"])]


def _by_name(
    state: Mapping[str, Any], own: Mapping[str, Any], part: str, factor: float
) -> list[float]:
    """Of each layer that has one; where it had none, what is there now."""
    if not len(own[part]):
        return []
    values = [factor * float(value) for value in state[part]]
    names = [name for name, _ in state["layers"]]
    there = dict(zip(names, values, strict=False))
    pairs = zip((name for name, _ in own["layers"]), own[part], strict=True)
    return [there.get(name, float(now)) for name, now in pairs]


def _scaled(arrays: Mapping[str, Any], factor: float) -> dict[str, Any]:
    if factor == 1:
        return dict(arrays)
    return {
        name: np.multiply(array, factor, dtype=np.asarray(array).dtype)
        for name, array in arrays.items()
    }


def _or_zeros(arrays: Mapping[str, Any], name: str, lengths: Mapping[str, int]) -> Any:
    there = arrays.get(name)
    return np.zeros(lengths[name], np.float32) if there is None else there
