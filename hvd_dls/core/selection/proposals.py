"""Arrays that change when a step ends, and not before: a step may be given up."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from hvd_dls.core.selection.backend import Array


class Proposals:
    """Arrays of layers, as they are and as the step in progress would have them.

    Args:
        names: of the layers that have an array between steps; others have one during a step only.
        make: a new array for a layer, zeros.

    Attributes:
        now: by name, as of the last step that ended.
    """

    def __init__(self, names: Iterable[str], make: Callable[[str], Array]) -> None:
        self._make = make
        self.now: dict[str, Array] = {name: make(name) for name in names}
        self._proposed: dict[str, Array] = {}
        self._spare: dict[str, Array] = {}  # memory of the arrays of the step before

    def propose(self, name: str) -> Array:
        """Memory for what the step would have, of any content."""
        array = self._spare.pop(name, None)
        self._proposed[name] = self._make(name) if array is None else array
        return self._proposed[name]

    def commit(self) -> None:
        """The step has ended."""
        for name, proposed in self._proposed.items():
            if name not in self.now:
                self._spare[name] = proposed
                continue
            self._spare[name], self.now[name] = self.now[name], proposed
        self._proposed = {}

    def forget(self) -> None:
        """The step has been given up."""
        self._spare |= self._proposed
        self._proposed = {}
