"""Variables of a model: which ones are accepted, their names, and where their residuals live."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import tensorflow as tf

from hvd_dls.core.balancing.layers import LayerSpec, layer_spec
from hvd_dls.errors import DLSError
from hvd_dls.tensorflow.handles import handle_of

_FLOATS = (tf.float16, tf.bfloat16, tf.float32, tf.float64)
_COUNTERS = re.compile(r"(?:_[0-9]+)*\Z")
# Numbers as they count, and as they are written: 1 and 01 are different.
_Counter = tuple[tuple[int, str], ...]


def checked_variables(variables: Iterable[Any]) -> list[Any]:
    """Returns a model's variables as a list.

    Raises:
        DLSError: something else was given, or a gradient would not be floating point.
    """
    wanted = "variables takes tf.Variable or Keras's, as model.trainable_variables gives"
    try:
        variables = list(variables)
    except TypeError as error:
        raise DLSError(f"{wanted}, not {variables!r}") from error
    for variable in variables:
        if handle_of(variable) is None:
            raise DLSError(f"{wanted}, not {type(variable).__name__}")
        if tf.as_dtype(variable.dtype) not in _FLOATS:
            raise DLSError(
                f"variable {variable.name!r} has type {tf.as_dtype(variable.dtype).name}; accepted "
                f"are {', '.join(dtype.name for dtype in _FLOATS)}"
            )
    return variables


def layer_specs_of(variables: Sequence[Any]) -> list[LayerSpec]:
    """Returns a model's layers, named by Keras's paths or TensorFlow's names, made distinct."""
    names = [getattr(v, "path", None) or v.name.removesuffix(":0") for v in variables]
    return [
        layer_spec(name, tuple(v.shape), "tensorflow", tf.as_dtype(v.dtype).size, stable_name)
        for v, name, stable_name in zip(
            variables, _made_distinct(names), stable_names(names), strict=True
        )
    ]


def stable_names(names: Sequence[str]) -> list[str]:
    """Renumbers automatic counters in a model's names, so that other models do not shift them.

    Keras calls the first dense layer of a process ``dense``, the next ``dense_1``, and so on, in
    whatever model they are.  A process that has made a model more than the others has other names
    for the same layers.  Here each word is numbered within the model: its lowest counter (or none)
    becomes none, the next one 1, and so on.  What ``dense_7`` and ``dense_8`` are in one process
    and ``dense`` and ``dense_1`` in another has the same names; if two layers have changed places,
    so have their names.

    Args:
        names: of one model's variables, in model order; parts of a path are separated by ``/``.

    Returns:
        Names in the same order, all different; those that repeat get their position appended.
    """
    paths = [[_without_counter(part) for part in name.split("/")] for name in names]
    counters: dict[str, set[_Counter]] = {}
    for path in paths:
        for word, counter in path:
            counters.setdefault(word, set()).add(counter)
    number = {
        (word, counter): i
        for word, of_word in counters.items()
        for i, counter in enumerate(sorted(of_word))
    }
    renumbered = [
        "/".join(f"{part[0]}_{number[part]}" if number[part] else part[0] for part in path)
        for path in paths
    ]
    return _made_distinct(renumbered)


def _without_counter(part: str) -> tuple[str, _Counter]:
    """Splits a part of a path into a word and its counters.

    All numbers at the end count as counters (``a_1_2``), or the word ``a_1`` of ``a_1_2`` could be
    taken for ``a`` with the counter 1.
    """
    match = _COUNTERS.search(part)
    assert match is not None  # the pattern matches an empty end, too
    numbers = match[0].split("_")[1:]
    return part[: match.start()], tuple((int(number), number) for number in numbers)


def _made_distinct(names: Sequence[str]) -> list[str]:
    """Appends their position to names that repeat."""
    taken: set[str] = set()
    distinct: list[str] = []
    for position, name in enumerate(names):
        while name in taken:
            name = f"{name}.{position}"
        taken.add(name)
        distinct.append(name)
    return distinct


def stays_on_device(variable: Any) -> bool:
    """Whether a variable's residual lives on the variable's device, and its gradient stays there.

    Only on GPUs: on a CPU the core's own loops are faster, and from other devices gradients are
    copied to the host.
    """
    return bool(tf.DeviceSpec.from_string(handle_of(variable).device).device_type == "GPU")
