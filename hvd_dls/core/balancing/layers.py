"""What DLS knows of a layer: its name and what its parameter's shape tells."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from hvd_dls.errors import DLSError

CONV, LINEAR, VECTOR, OTHER = "conv", "linear", "vector", "other"
LAYOUTS = ("torch", "tensorflow")


@dataclass(frozen=True)
class LayerSpec:
    """One parameter tensor.

    Attributes:
        name: unique in its model and the same on every rank.
        shape: of the parameter, in its framework's own order.
        kind: "conv", "linear", "vector" (0-D and 1-D: biases, normalisation) or "other".
        kernel: kernel positions, k_h * k_w of Eq. 8; 1 for what is no convolution.
        fan_in: input channels c (per group for a grouped convolution), or inputs.
        fan_out: output channels d, or outputs.
        itemsize: bytes per gradient entry.
        stable_name: what ranks compare and states are matched by: the name without what a framework
            numbers by itself (``dense_3``), which depends on what else a process has made.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    kernel: int
    fan_in: int
    fan_out: int
    itemsize: int = 4
    stable_name: str = ""  # the name itself, if none is given

    def __post_init__(self) -> None:
        object.__setattr__(self, "stable_name", self.stable_name or self.name)

    @cached_property
    def size(self) -> int:
        """Number of entries, n_l."""
        return math.prod(self.shape)

    @property
    def work_dtype(self) -> np.dtype:
        """Type of residual and sent values: float64 for float64 gradients, else float32."""
        return np.dtype(np.float64 if self.itemsize == 8 else np.float32)


def layer_spec(
    name: str,
    shape: tuple[int, ...],
    layout: str = "torch",
    itemsize: int = 4,
    stable_name: str = "",
) -> LayerSpec:
    """Reads a parameter's shape.

    Args:
        name: of the parameter.
        shape: torch: (d, c/groups, *kernel) and (d, c); tensorflow: (*kernel, c/groups, d)
            and (c, d).
        layout: "torch" or "tensorflow".
        itemsize: bytes per gradient entry: 2, 4 or 8.
        stable_name: see ``LayerSpec``.

    Raises:
        DLSError: unknown layout.
    """
    if layout not in LAYOUTS:
        raise DLSError(f"layout={layout!r}: accepted are {', '.join(map(repr, LAYOUTS))}")
    shape = tuple(int(extent) for extent in shape)
    if len(shape) < 2:
        return LayerSpec(name, shape, VECTOR, 1, 1, math.prod(shape), itemsize, stable_name)
    if layout == "torch":
        fan_out, fan_in, kernel = shape[0], shape[1], shape[2:]
    else:
        fan_out, fan_in, kernel = shape[-1], shape[-2], shape[:-2]
    kind = {0: LINEAR, 1: CONV, 2: CONV, 3: CONV}.get(len(kernel), OTHER)
    return LayerSpec(name, shape, kind, math.prod(kernel), fan_in, fan_out, itemsize, stable_name)
