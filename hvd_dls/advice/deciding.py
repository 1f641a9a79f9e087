"""From times of turns to a prediction, and from predictions to a recommendation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hvd_dls.advice.candidates import DENSE, Candidate


@dataclass(frozen=True)
class Prediction:
    """What is expected of a figure, from its values in several turns.

    Attributes:
        value: the median of the turns.
        low, high: smallest and largest turn.  If turns are alike but for chance, the true median
            of turns lies between them with probability 1 - 2^(1 - n), n turns: 94 % of five.
        turns: number of turns.
    """

    value: float
    low: float
    high: float
    turns: int

    @classmethod
    def of(cls, turns: Sequence[float]) -> Prediction:
        """The prediction from values of turns, one at least."""
        values = np.asarray(turns, float)
        return cls(float(np.median(values)), float(values.min()), float(values.max()), len(values))


def decide(seconds: Mapping[Candidate, float], worth: float) -> Candidate:
    """The most cautious candidate that is fast enough.

    Compression has a price that no clock shows, so a more cautious candidate is taken unless the
    fastest is more than ``worth`` times as fast.

    Args:
        seconds: of a step, by candidate; one at least.
        worth: ratio >= 1 from which a faster step is worth less caution.

    Returns:
        Of those that take at most ``worth`` times the fastest's time, the most cautious; of equally
        cautious ones, the fastest.
    """
    enough = worth * min(seconds.values())
    good = [candidate for candidate, each in seconds.items() if each <= enough]
    return min(good, key=lambda candidate: (candidate.caution, seconds[candidate]))


@dataclass(frozen=True)
class Decision:
    """A recommendation, and how sure it is.

    Attributes:
        candidate: that is recommended, by medians of the ratios to dense in each turn.
        votes: what each turn on its own would have recommended.
    """

    candidate: Candidate
    votes: tuple[Candidate, ...]

    @property
    def agreeing(self) -> int:
        """Number of turns that say the same."""
        return self.votes.count(self.candidate)

    @property
    def others(self) -> list[Candidate]:
        """What other turns say, the most cautious first."""
        return sorted(set(self.votes) - {self.candidate}, key=lambda each: each.caution)


def recommend(turns: Mapping[Candidate, Sequence[float]], worth: float) -> Decision:
    """Decides by all turns, in each of which dense is what others are compared with; and by each.

    Args:
        turns: seconds of a step in each turn, all > 0, as many for each candidate; of dense, too.
        worth: see ``decide``.
    """
    seconds = np.array([*turns.values()], float)
    # What slows all of a turn down, such as another program, is no difference between candidates.
    ratios = np.median(np.asarray(turns[DENSE], float) / seconds, axis=1)
    beside_dense = dict(zip(turns, (1 / ratios).tolist(), strict=True))
    votes = tuple(decide(dict(zip(turns, each, strict=True)), worth) for each in seconds.T.tolist())
    return Decision(decide(beside_dense, worth), votes)
