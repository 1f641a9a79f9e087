"""Clipping by the norm of the whole model, while its layers still come in one by one.

A gradient's global norm is known when its last layer is there; by then the first ones have been
compressed and are on their way.  So each layer's norm is limited to its usual part of the limit:
the limit times the root of the layer's mean share of the squares of the global norm, in the steps
before.  Squares of these parts add up to the limit's, so what is left of a gradient is not longer
than the limit, whatever came in; and while each layer has its usual share of a norm, all are scaled
by limit / norm, as ``torch.nn.utils.clip_grad_norm_`` does.  The order of layers does not matter.

The global norm of the step before would need no shares, but tells of a spike one step too late: see
docs/adam.md for what that is worth.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

_KEPT = 0.9  # of a share, when a step adds its own


class UsualShares:
    """The layers' mean shares of the squares of a gradient's global norm, on one rank.

    A step is a transaction: what ``note`` is told counts when ``commit`` ends it.

    Args:
        limit: largest global norm.

    Attributes:
        squares: mean share of each layer that had a gradient other than zero, by name, in [0, 1].
    """

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self.squares: dict[str, float] = {}
        self._noted: dict[str, tuple[Any, float]] = {}

    def limit_of(self, name: str) -> float:
        """Largest norm of a layer; all of the limit if its share is not known yet."""
        return self._limit * math.sqrt(self.squares.get(name, 1.0))

    def note(self, name: str, norm: Any, at_most: float = math.inf) -> None:
        """Takes note of a layer's norm in the step in progress.

        Args:
            name: of the layer.
            norm: of its gradient; of one on a device, what ``float`` takes later.
            at_most: what it is limited to for another reason.
        """
        self._noted[name] = norm, at_most

    def commit(self) -> None:
        """Has the step in progress count: shares of layers that were in it move.

        Others keep theirs: if parts of a model train in turns, each has its usual share of a step
        of its own.
        """
        norms = {name: min(float(norm), most) for name, (norm, most) in self._noted.items()}
        self._noted = {}
        # A layer without a gradient, behind weights that begin at zero, has no usual share yet.
        norms = {name: norm for name, norm in norms.items() if 0 < norm < math.inf}
        largest = max(norms.values(), default=0.0)
        total = sum((norm / largest) ** 2 for norm in norms.values())
        for name, norm in norms.items():
            share = (norm / largest) ** 2 / total
            before = self.squares.get(name, share)
            self.squares[name] = _KEPT * before + (1 - _KEPT) * share

    def forget(self) -> None:
        """Leaves the shares as they were before the step."""
        self._noted = {}

    def load(self, squares: Mapping[str, float]) -> None:
        """Goes on from shares that were saved, by name."""
        self.squares = {name: float(share) for name, share in squares.items()}
