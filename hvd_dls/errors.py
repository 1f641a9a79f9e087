"""The errors a user can meet.  Each message names the layer or option, what was seen and wanted."""

from __future__ import annotations

from collections.abc import Iterable


class DLSError(ValueError):
    """Wrong input or use: an option, a layer or a combination that cannot work."""


class PayloadError(DLSError):
    """A gathered payload is malformed or does not belong to this layer and configuration."""


class StateMismatchError(DLSError):
    """A saved state belongs to other layers or to another configuration."""


class NonFiniteGradientError(ArithmeticError):
    """A gradient held NaN or Inf on some rank.  Every rank raises this same error.

    Args:
        where: (layer name, rank) of each offending gradient of the step.
    """

    def __init__(self, where: Iterable[tuple[str, int]]) -> None:
        self.where = sorted(set(where))
        places = ", ".join(f"layer {name!r} on rank {rank}" for name, rank in self.where)
        super().__init__(
            f"gradient with NaN or Inf in {places}; nothing of it entered a residual. "
            "Lower the learning rate or clip gradients."
        )

    def __reduce__(self):  # type: ignore[no-untyped-def]
        return type(self), (self.where,)
