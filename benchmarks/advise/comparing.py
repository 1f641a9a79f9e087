"""Predictions beside measurements."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from hvd_dls.advice.candidates import Candidate
from hvd_dls.advice.deciding import decide

Case = dict[str, Any]
SLACK = 1.1  # so far from the rule's limit, measured times may be on its other side


class Compared(NamedTuple):
    """A candidate in one case.

    Attributes:
        case, name: which.
        predicted: seconds of a step, and smallest and largest turn, by the advice.
        measured: the same, by the trainings before and after.
        apart: longer over shorter of what the two trainings say, medians, minus 1.
    """

    case: str
    name: str
    predicted: tuple[float, float, float]
    measured: tuple[float, float, float]
    apart: float

    @property
    def error(self) -> float:
        """Of the prediction: predicted over measured, minus 1."""
        return self.predicted[0] / self.measured[0] - 1

    @property
    def within(self) -> bool:
        """Whether what was measured is between the smallest and largest predicted turn."""
        return self.predicted[1] <= self.measured[0] <= self.predicted[2]


def compare(case: Case) -> list[Compared]:
    """Each candidate's prediction beside what was measured."""
    rows = []
    for row in case["advice"]["rows"]:
        jobs = [training[row["name"]] for training in case["trainings"]]
        turns = np.concatenate(jobs)
        medians = [float(np.median(job)) for job in jobs]
        seconds = row["seconds"]
        rows.append(
            Compared(
                case["title"],
                row["name"],
                (seconds["value"], seconds["low"], seconds["high"]),
                (float(np.median(turns)), float(turns.min()), float(turns.max())),
                max(medians) / min(medians) - 1,
            )
        )
    return rows


class Verdict(NamedTuple):
    """What was recommended in a case, and what measurements say.

    Attributes:
        recommended: by the advice.
        best: what the same rule makes of the measured times.
        regret: measured time of the recommended over that of the fastest.
        spared: the same of the fastest that is more cautious; Inf if none is.
        worth: how many times as fast a less cautious candidate has to be, by the rule.
        turns: how many of the advice's turns said the same, and how many there were.
    """

    recommended: Candidate
    best: Candidate
    regret: float
    spared: float
    worth: float
    turns: tuple[int, int]

    @property
    def right(self) -> bool:
        """Whether, but for SLACK, it is fast enough and nothing more cautious would have been."""
        return self.regret <= self.worth * SLACK and self.spared > self.worth / SLACK

    @property
    def same(self) -> bool:
        """Whether measurements lead to the same candidate."""
        return self.recommended == self.best


def judge(case: Case) -> Verdict:
    """Compares the recommendation with what measured times lead to."""
    measured: Mapping[Candidate, float] = {
        Candidate.of(row.name): row.measured[0] for row in compare(case)
    }
    advice = case["advice"]
    recommended = Candidate.of(advice["recommended"]["name"])
    votes, fastest = advice["votes"], min(measured.values())
    cautious = [s for each, s in measured.items() if each.caution < recommended.caution]
    return Verdict(
        recommended,
        decide(measured, advice["worth"]),
        measured[recommended] / fastest,
        min(cautious, default=float("inf")) / fastest,
        advice["worth"],
        (votes.count(recommended.name), len(votes)),
    )
