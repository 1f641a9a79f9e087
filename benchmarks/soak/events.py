"""What happens in each step: drawn from a seed, so that all ranks know of it."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

import numpy as np

FROZEN_STEPS = 40  # longer than a layer has to stay away until others get its share


class Event(Enum):
    """What a step is like."""

    PLAIN = "plain"
    SKIPPED = "skipped: NaN or Inf on one rank"
    ABANDONED = "given up by one rank"
    RELOADED = "state saved and loaded"
    ROLLED_BACK = "weights and state of an earlier step loaded"


_SHARES = {
    Event.SKIPPED: 0.005,
    Event.ABANDONED: 0.005,
    Event.RELOADED: 0.002,
    Event.ROLLED_BACK: 0.001,
}


class Fate:
    """What is the same on all ranks.

    Args:
        seed: of all draws.
        often: how many times as often as usual something happens; up to 70.
        ranks: number of ranks.
        layers: names of all layers.
    """

    def __init__(self, seed: int, often: float, ranks: int, layers: Sequence[str]) -> None:
        self._shares = [often * share for share in _SHARES.values()]
        self._seed, self._ranks, self._layers = seed, ranks, list(layers)

    def event(self, step: int) -> tuple[Event, int, str]:
        """What happens in a step, to which rank, and to which layer that trains."""
        random = np.random.default_rng((self._seed, step))
        plain = 1 - sum(self._shares)
        events = [Event.PLAIN, *_SHARES]
        event = events[random.choice(len(events), p=[plain, *self._shares])]
        trained = [layer for layer in self._layers if layer != self.frozen(step)]
        return event, int(random.integers(self._ranks)), str(random.choice(trained))

    def frozen(self, step: int) -> str | None:
        """The layer that no rank trains in a step; every third time none."""
        phase = step // FROZEN_STEPS
        if phase % 3 == 0:
            return None
        return str(np.random.default_rng((self._seed, 1 << 40, phase)).choice(self._layers))
