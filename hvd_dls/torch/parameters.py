"""The parameters of a model: their names, which gradient is whose, and how they travel."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch.utils.weak import TensorWeakRef

from hvd_dls.core.balancing.layers import LayerSpec, layer_spec
from hvd_dls.core.checkpoint.redistribution import ARRAYS
from hvd_dls.errors import DLSError

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

NamedParameter = tuple[str, torch.Tensor]


class Parameters:
    """Parameters by name, and names by parameter or gradient.

    ids and addresses, which are used again after a free, play no part.

    Args:
        named_parameters: (name, parameter) in model order; only weak references are kept.
    """

    def __init__(self, named_parameters: Iterable[NamedParameter]) -> None:
        pairs = list(named_parameters)
        self._references = {name: TensorWeakRef(parameter) for name, parameter in pairs}
        self._names = {id(parameter): name for name, parameter in pairs}
        self._of_shape: dict[torch.Size, list[str]] = {}
        for name, parameter in pairs:
            self._of_shape.setdefault(parameter.shape, []).append(name)

    def named(self) -> list[NamedParameter]:
        """Those that still exist."""
        pairs = ((name, reference()) for name, reference in self._references.items())
        return [(name, parameter) for name, parameter in pairs if parameter is not None]

    def frozen(self) -> set[str]:
        """Names of those that do not train at the moment."""
        return {name for name, parameter in self.named() if not parameter.requires_grad}

    def get(self, name: str) -> torch.Tensor | None:
        """The parameter of a name, if it still exists."""
        parameter: torch.Tensor | None = self._references[name]()
        return parameter

    def name_of(self, parameter: torch.Tensor) -> str | None:
        """Name of a parameter, or None."""
        name = self._names.get(id(parameter))
        return name if name is not None and self.get(name) is parameter else None

    def name_of_gradient(self, gradient: torch.Tensor) -> str | None:
        """Name of the parameter whose ``.grad`` this tensor is, or None."""
        names = self._of_shape.get(gradient.shape, [])
        for position, name in enumerate(names):
            parameter = self.get(name)
            if parameter is not None and parameter.grad is gradient:
                # Hooks fire in much the same order every step: the next one asked for is now first.
                names.append(names.pop(position))
                return name
        return None

    def is_same_set(self, parameters: Iterable[torch.Tensor]) -> bool:
        """Whether these are all of the parameters, and no others."""
        return {id(p) for p in parameters} == {id(p) for _, p in self.named()}


def specs_of(named_parameters: Iterable[NamedParameter]) -> list[LayerSpec]:
    """What the core knows of parameters.

    Raises:
        DLSError: a gradient would not be floating point.
    """
    specs = []
    for name, parameter in named_parameters:
        if parameter.dtype not in _FLOATS:
            raise DLSError(
                f"parameter {name!r} has type {parameter.dtype}; accepted are "
                f"{', '.join(map(str, _FLOATS))}"
            )
        shape = tuple(parameter.shape)
        specs.append(layer_spec(name, shape, "torch", parameter.element_size()))
    return specs


def checked(named_parameters: Iterable[NamedParameter]) -> list[NamedParameter]:
    """What a user gave as named parameters; of several names of one parameter, the first.

    Raises:
        DLSError: it is something else, or a gradient would not be floating point.
    """
    wanted = "named_parameters takes (name, parameter) pairs, as model.named_parameters() gives"
    try:
        pairs = [(name, parameter) for name, parameter in named_parameters]
    except (TypeError, ValueError) as error:
        raise DLSError(f"{wanted}, not {named_parameters!r}") from error
    for name, parameter in pairs:
        if not isinstance(name, str) or not isinstance(parameter, torch.Tensor):
            raise DLSError(f"{wanted}, not ({name!r}, {type(parameter).__name__})")
    specs_of((name, parameter) for name, parameter in pairs if parameter.requires_grad)
    first: dict[int, NamedParameter] = {}
    for name, parameter in pairs:
        first.setdefault(id(parameter), (name, parameter))
    return list(first.values())


def stays_on_device(parameter: torch.Tensor) -> bool:
    """Whether residual and passes are to be where a parameter is; on a CPU, the core's are faster.

    Of other devices than GPUs, gradients go by way of the host.
    """
    return parameter.is_cuda


def as_numpy(gradient: torch.Tensor) -> np.ndarray:
    """(n,) on the host: a tensor's own memory, if that is there and contiguous.

    NumPy has no bfloat16: that comes as its bits, uint16.
    """
    if gradient.dtype == torch.bfloat16:
        return gradient.view(torch.int16).numpy(force=True).view(np.uint16).reshape(-1)
    return gradient.numpy(force=True).reshape(-1)


def copy_back(array: np.ndarray, gradient: torch.Tensor) -> None:
    """Writes into a tensor what ``as_numpy`` had to copy out of it."""
    if gradient.dtype == torch.bfloat16:
        gradient.copy_(
            torch.from_numpy(array.view(np.int16)).view(gradient.dtype).view_as(gradient)
        )
    else:
        gradient.copy_(torch.from_numpy(array).view_as(gradient))


def with_tensors(state: dict[str, Any]) -> dict[str, Any]:
    """A session's state in types that ``torch.load(weights_only=True)`` accepts."""
    lists = {key: state[key].tolist() for key in ("ratios", "thresholds")}
    tensors = {
        part: {name: torch.as_tensor(array) for name, array in state[part].items()}
        for part in (*ARRAYS, "kept")
        if part in state
    }
    return state | lists | tensors
