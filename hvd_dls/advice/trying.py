"""What all ranks do to find out what to advise."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict

import numpy as np

import hvd_dls
from hvd_dls.advice.advice import Advice, Row
from hvd_dls.advice.candidates import ALONE, DENSE, Candidate
from hvd_dls.advice.deciding import Prediction, recommend
from hvd_dls.advice.lab import OPERATIONS, Lab, Subject
from hvd_dls.advice.link import sent_by_allreduce
from hvd_dls.advice.plan import Plan
from hvd_dls.advice.ranks import everyone, on_all
from hvd_dls.advice.turns import Running, line_of, take_turns
from hvd_dls.core.session.stopwatch import PARTS
from hvd_dls.core.wire import agreement
from hvd_dls.errors import DLSError


def find_out(
    lab: Lab, prepare: Callable[[], tuple[Plan, Subject]], say: Callable[[str], None]
) -> Advice:
    """Finds out what each candidate's steps take in this job; to be called on all ranks.

    Args:
        lab: this rank's.
        prepare: makes plan and model; exchanges nothing.
        say: told on rank 0 what goes on.

    Returns:
        The advice; the same on all ranks, but for ``parts``, ``load`` and ``cores``.

    Raises:
        RanksDisagreeError: models or plans differ; on all ranks alike, before anything is timed.
        DLSError: there is only one rank, or ``prepare`` or a first step failed on some; on all
            ranks alike.
    """
    if lab.size == 1:
        raise DLSError("one process has nobody to exchange with: start several, with horovodrun")
    load = os.getloadavg()[0]
    plan, subject = on_all(lab, prepare)
    facts = [("version of hvd_dls", hvd_dls.__version__), ("the plan", repr(plan))]
    agreement.check_facts(everyone(lab, "facts", [*facts, *subject.facts()]))
    on_all(lab, lambda: subject.trial(ALONE).step())  # a model that fails does so without others
    tell = say if lab.rank == 0 else _say_nothing
    tell("timing allreduce and allgather")
    entries, sizes = np.array(subject.gradients(), np.int64).reshape(-1, 2).T
    whole = float((entries * sizes).sum())
    lines = {operation: line_of(lab, operation, whole) for operation in OPERATIONS}
    # Where hosts have different numbers of ranks, some of these count fewer hosts.
    hosts = max(everyone(lab, "hosts", lab.cross_size))
    wanted = [ALONE, *plan.candidates(lab.size, hosts)]
    running, unavailable = take_turns(lab, subject, plan, wanted, tell)
    turns = {each: tuple(of.turns) for each, of in running.items() if each != ALONE}
    return Advice(
        ranks=lab.size,
        hosts=hosts,
        local_size=lab.local_size,
        entries=int(entries.sum()),
        tensors=len(entries),
        lines=lines,
        alone=Prediction.of(running[ALONE].turns),
        rows=tuple(
            _row(each, running[each], turns[DENSE], _dense_bytes(each, entries, sizes, lab.size))
            for each in turns
        ),
        decision=recommend(turns, plan.worth),
        worth=plan.worth,
        load=(load, os.getloadavg()[0]),
        cores=os.cpu_count() or 1,
        unavailable=unavailable,
    )


def _row(
    candidate: Candidate, running: Running, dense: tuple[float, ...], dense_bytes: float
) -> Row:
    stats = running.trial.stats(running.steps)
    link_bytes, parts = dense_bytes, {}
    if stats is not None:
        window = stats.window
        steps = max(window.steps, 1)
        link_bytes = window.link_bytes / steps
        parts = {part: asdict(window.seconds)[part] / steps for part in (*PARTS, "total")}
    return Row(
        candidate=candidate,
        seconds=Prediction.of(running.turns),
        dense_over_this=Prediction.of(np.divide(dense, running.turns).tolist()),
        link_bytes=link_bytes,
        parts=parts,
        turns=tuple(running.turns),
    )


def _dense_bytes(candidate: Candidate, entries: np.ndarray, sizes: np.ndarray, ranks: int) -> float:
    """What a rank sends in a step if nothing is sparse; floating point types are wider than 2."""
    each = np.minimum(sizes, 2) if candidate.method == "fp16" else sizes
    return sent_by_allreduce(float((entries * each).sum()), ranks)


def _say_nothing(text: str) -> None:
    """Other ranks than 0."""
