"""What ``compress`` hands to ``decompress``, and the form in which Horovod takes a gradient.

What Horovod is given it reduces in place.  So it is kept here: if a wait is interrupted, Horovod
has forgotten the result, and the user's next ``synchronize()`` finds it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from hvd_dls.core.selection.backend import Array
    from hvd_dls.torch.binding import Binding


class Dense(NamedTuple):
    """Of a gradient that Horovod reduces whole."""

    dtype: torch.dtype
    whole: torch.Tensor
    binding: Binding | None = None  # of the model whose gradient it is, if that is known
    name: str = ""


class InFlight(NamedTuple):
    """Of a gradient that ``compress`` sent on its way."""

    binding: Binding
    name: str
    gradient: torch.Tensor
    array: Array  # what the session was given: the gradient's own memory, or a copy
    placeholder: torch.Tensor  # what Horovod reduces instead


def as_sent(gradient: torch.Tensor) -> torch.Tensor:
    """A gradient as Horovod takes it: it refuses bfloat16 and memory that is not contiguous."""
    wide = gradient.float() if gradient.dtype == torch.bfloat16 else gradient
    return wide.contiguous()


def send_dense(
    gradient: torch.Tensor, binding: Binding | None = None, name: str = ""
) -> tuple[torch.Tensor, Dense]:
    """What Horovod is to reduce whole, and what ``decompress`` is to know of it."""
    whole = as_sent(gradient)
    return whole, Dense(gradient.dtype, whole, binding, name)
