"""What compressors remember at one moment: elastic training goes back to it when a rank is lost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from hvd_dls.adapter.binding import BaseBinding
from hvd_dls.adapter.compressor import BaseCompressor
from hvd_dls.core.session.groups import Groups


class _Model(NamedTuple):
    """What a model's session remembered.

    Attributes:
        state: its ``state_dict()``, with arrays of its own, on the host.
        groups: the ranks of that moment: residuals are in proportion to their number.
    """

    state: Mapping[str, Any]
    groups: Groups


class Commit:
    """Copies of all that a compressor remembers, of all models that it trains.

    Made and used on one rank alone: no other is asked, so that it can be gone back to when Horovod
    has lost a rank.  Ranks agree anew at the next gradient, and there what waits in residuals is
    scaled to the number of ranks of then.

    Args:
        compressor: of any framework whose bindings give states as NumPy arrays.

    Attributes:
        compressor: as given.

    Raises:
        DLSError: a step is being written.
    """

    def __init__(self, compressor: BaseCompressor) -> None:
        self.compressor = compressor
        self._loaded = list(compressor._loaded)
        self._models = [
            (binding, _Model(_copied(binding.state_dict()), binding.session.groups))
            for binding in compressor._bindings
            if binding.alive and binding.session is not None
        ]

    @classmethod
    def of_nothing(cls, compressor: BaseCompressor) -> Commit:
        """What a compressor remembered before it was made."""
        commit = cls.__new__(cls)
        commit.compressor, commit._loaded, commit._models = compressor, [], []
        return commit

    def go_back(self) -> None:
        """Has the compressor remember what it did; a step in progress is forgotten.

        Models that have begun since then begin once more.
        """
        self.compressor._loaded[:] = self._loaded
        for binding in self.compressor._bindings:
            model = next((kept for of, kept in self._models if of is binding), None)
            _go_back(binding, model)


def _go_back(binding: BaseBinding, model: _Model | None) -> None:
    if model is None:
        binding.go_on_from(None)
        return
    session = binding.blank_session(model.groups)
    session.memory.load(model.state)
    if binding.session is not None:
        session.count_on_from(binding.session)
    binding.go_on_from(session)


def _copied(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state with arrays of its own."""
    return {
        part: {name: np.array(array) for name, array in value.items()}
        if part in ("residuals", "velocities")
        else value
        for part, value in state.items()
    }
