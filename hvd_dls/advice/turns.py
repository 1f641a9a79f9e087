"""Operations are timed, candidates take turns."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from hvd_dls.advice.candidates import ALONE, Candidate
from hvd_dls.advice.lab import Lab, Subject, Trial
from hvd_dls.advice.link import Line, fit_line, sent_by_allgather, sent_by_allreduce
from hvd_dls.advice.plan import Plan
from hvd_dls.advice.ranks import slowest
from hvd_dls.errors import DLSError

LENGTHS = tuple(1 << power for power in (10, 14, 17, 20, 22, 24))  # bytes of timed operations
LONG = 0.3  # seconds of an operation after which no larger one is timed
REPEATS = 5  # of each operation
SETTLING = 15  # steps in which DLS's ratios and the lengths of its payloads settle
MOST_STEPS = 200  # in a turn

Say = Callable[[str], None]


def line_of(lab: Lab, operation: str, most: float) -> Line:
    """Times an operation of several sizes.

    Args:
        lab: this rank's.
        operation: one of OPERATIONS.
        most: bytes of the largest that is of interest.
    """
    sent_by = sent_by_allgather if operation == "allgather" else sent_by_allreduce
    sent, seconds = [], []
    for length in LENGTHS:
        lab.operate(operation, length)  # negotiated here, remembered afterwards
        taken = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            lab.operate(operation, length)
            taken.append(time.perf_counter() - start)
        sent.append(sent_by(length, lab.size))
        seconds += slowest(lab, [float(np.median(taken))])
        if len(sent) > 1 and (seconds[-1] > LONG or length >= most):
            break
    return fit_line(sent, seconds)


@dataclass
class Running:
    """A candidate that takes turns.

    Attributes:
        trial: its steps.
        steps: in a turn.
        before: steps at the beginning of a turn that are not timed: what a turn of another has
            driven out of caches, Horovod's among them, comes back there.
        turns: seconds of a step, in each turn so far.
    """

    trial: Trial
    steps: int
    before: int
    turns: list[float] = field(default_factory=list)

    def take_turn(self, lab: Lab) -> None:
        """Makes the steps of a turn."""
        for _ in range(self.before):
            self.trial.step()
        self.turns.append(_mean_step(lab, self.trial, self.steps))
        self.trial.rest()


def take_turns(
    lab: Lab, subject: Subject, plan: Plan, wanted: list[Candidate], say: Say
) -> tuple[dict[Candidate, Running], dict[Candidate, str]]:
    """Tries candidates, in another order in each round, so that all else hits all alike.

    Args:
        lab: this rank's.
        subject: the model.
        plan: how long.
        wanted: the candidates.
        say: told what goes on.

    Returns:
        What each took, and why others could not be tried.
    """
    share = plan.seconds / (plan.turns * len(wanted))
    running: dict[Candidate, Running] = {}
    unavailable: dict[Candidate, str] = {}
    for candidate in wanted:
        say(f"first steps: {candidate.title}")
        trial = subject.trial(candidate)
        try:
            trial.step()
        except DLSError as refusal:  # on all ranks alike, before anything was sent
            unavailable[candidate] = " ".join(str(refusal).split())
            continue
        steps, before = _warm_up(lab, trial, candidate, share)
        running[candidate] = Running(trial, steps, before)
        trial.rest()
    order = list(running)
    for number in range(plan.turns):
        for position in np.random.default_rng(number).permutation(len(order)).tolist():
            say(f"turn {number + 1} of {plan.turns}: {order[position].title}")
            running[order[position]].take_turn(lab)
    return running, unavailable


def _warm_up(lab: Lab, trial: Trial, candidate: Candidate, share: float) -> tuple[int, int]:
    """Makes steps until they are as they stay.

    Args:
        lab: this rank's.
        trial: of the candidate.
        candidate: which one.
        share: seconds that a turn should take.

    Returns:
        Steps that a turn should have, and those before them.
    """
    seconds = _mean_step(lab, trial, 1)
    most = SETTLING if candidate.method == "dls" else 3
    if more := min(most, int(2 * share / seconds)):
        seconds = _mean_step(lab, trial, more)
    elif candidate.method == "dls":  # slow, but its first steps are not as the others
        seconds = _mean_step(lab, trial, 3)
    before = 1 if candidate != ALONE and seconds < share else 0
    return int(np.clip(round(share / seconds) - before, 1, MOST_STEPS)), before


def _mean_step(lab: Lab, trial: Trial, steps: int) -> float:
    """Seconds of a step, of the slowest rank; all ranks begin when all are there."""
    trial.wait()
    slowest(lab, [0.0])
    start = time.perf_counter()
    for _ in range(steps):
        trial.step()
    trial.wait()
    return slowest(lab, [(time.perf_counter() - start) / steps])[0]
