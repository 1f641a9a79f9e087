"""What was found out, as text and for JSON."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from hvd_dls.advice.candidates import ALONE, DENSE, Candidate
from hvd_dls.advice.deciding import Decision, Prediction
from hvd_dls.advice.link import Line
from hvd_dls.config import ALLGATHER
from hvd_dls.core.session.stats import bytes_text, plain_of, table

UNKNOWN = (
    "What no clock can tell is whether the model trains as well: docs/convergence.md has what was "
    "measured, docs/tuning.md what to set with it (warm-up, momentum correction)."
)

OWNERS = (
    "With sparse_allreduce a step changes fewer entries of the model than with allgather at the "
    "same density: docs/scale.md compares how both train at equal bytes."
)


@dataclass(frozen=True)
class Row:
    """What is expected of one candidate.

    Attributes:
        candidate: which one.
        seconds: of a step, forward and backward included.
        dense_over_this: how many times as long a dense step takes, of steps of the same turn.
        link_bytes: that a rank sends in a step by ring algorithms, (P - 1) payloads and
            2 (P - 1) / P of all else; with ``hierarchical``, between hosts; with
            "sparse_allreduce", on average of all ranks.
        parts: seconds of a step on this rank, by the part of compression, in the last turn
            (``compression.stats()``); "wait" is no work, "total" no part.
        turns: seconds of a step in each turn.
    """

    candidate: Candidate
    seconds: Prediction
    dense_over_this: Prediction
    link_bytes: float
    parts: Mapping[str, float]
    turns: tuple[float, ...]


@dataclass(frozen=True)
class Advice:
    """What to expect of each candidate, and which to take; its ``str`` is a report.

    Attributes:
        ranks, hosts, local_size: of the job; ranks of this host.
        entries, tensors: of the model.
        lines: time of operations by their size: "allreduce float32", "allreduce float16",
            "allgather".
        alone: seconds of a step without any exchange.
        rows: of each candidate, the most cautious first.
        unavailable: candidates that could not be tried, and why.
        decision: what is recommended.
        worth: how many times as fast a step has to be for less caution.
        load: the machine's mean number of processes that want to run, before and after.
        cores: of this host.
    """

    ranks: int
    hosts: int
    local_size: int
    entries: int
    tensors: int
    lines: Mapping[str, Line]
    alone: Prediction
    rows: tuple[Row, ...]
    decision: Decision
    worth: float
    load: tuple[float, float]
    cores: int
    unavailable: Mapping[Candidate, str] = field(default_factory=dict)

    @property
    def recommended(self) -> Candidate:
        """The candidate to take: ``.code`` is what to write, ``.options`` DLSCompressor's."""
        return self.decision.candidate

    def row(self, candidate: Candidate) -> Row:
        """The row of a candidate.

        Raises:
            KeyError: it was not tried.
        """
        for row in self.rows:
            if row.candidate == candidate:
                return row
        raise KeyError(candidate.name)

    def as_dict(self) -> dict[str, Any]:
        """Returns plain lists, dictionaries, strings and numbers; None for NaN and Inf."""
        result: dict[str, Any] = plain_of(
            {
                "format": 1,
                "ranks": self.ranks,
                "hosts": self.hosts,
                "local_size": self.local_size,
                "entries": self.entries,
                "tensors": self.tensors,
                "lines": dict(self.lines),
                "alone": self.alone,
                "rows": [
                    {"name": row.candidate.name, "code": row.candidate.code, **plain_of(row)}
                    for row in self.rows
                ],
                "unavailable": {each.name: why for each, why in self.unavailable.items()},
                "recommended": {"name": self.recommended.name, "code": self.recommended.code},
                "votes": [each.name for each in self.decision.votes],
                "worth": self.worth,
                "load": self.load,
                "cores": self.cores,
                "text": str(self),
            }
        )
        return result

    def __str__(self) -> str:
        return "\n\n".join("\n".join(part) for part in self._parts())

    def _parts(self) -> Iterator[list[str]]:
        tensors = f"{self.entries:,} gradients in {self.tensors} tensors"
        places = f"{self.ranks} ranks on {self.hosts} host(s)"
        yield [f"hvd-dls advise: {places}, {tensors}", *self._speeds()]
        yield [table(self._table())]
        left_out = [f"not tried: {each.title}: {why}" for each, why in self.unavailable.items()]
        if left_out:
            yield left_out
        yield [*self._conclusion(), UNKNOWN]
        if any(row.candidate.exchange != ALLGATHER for row in self.rows):
            yield [OWNERS]

    def _speeds(self) -> Iterator[str]:
        for name, line in self.lines.items():
            speed = "no time that grows with their size"
            if math.isfinite(line.bandwidth):
                speed = f"{8e-6 * line.bandwidth:,.0f} Mbit/s sent by a rank"
            yield f"{name}: {1e3 * line.latency:.3g} ms and {speed}"
        yield f"load {self.load[0]:.1f} to {self.load[1]:.1f}, {self.cores} cores on this host"

    def _table(self) -> list[list[str]]:
        turns = self.alone.turns
        head = ["", "step, ms", f"in {turns} turns", "dense / this", f"in {turns} turns"]
        rows = [[*head, "sent a step", "compression, ms"]]
        rows.append([_title(ALONE), *_cells(self.alone, 1e3), "", "", "", ""])
        for row in self.rows:
            work = sum(row.parts[part] for part in row.parts if part not in ("wait", "total"))
            cells = [*_cells(row.seconds, 1e3), *_cells(row.dense_over_this)]
            cells += [bytes_text(row.link_bytes), f"{1e3 * work:.3g}" if row.parts else ""]
            rows.append([_title(row.candidate), *cells])
        return rows

    def _conclusion(self) -> Iterator[str]:
        best, votes = self.recommended, len(self.decision.votes)
        fastest = max(self.rows, key=lambda row: row.dense_over_this.value)
        if best == DENSE:
            yield (
                f"Leave it dense: the fastest, {fastest.candidate.title}, is "
                f"{fastest.dense_over_this.value:.3g} times as fast, and less than {self.worth:g} "
                "times is not worth it."
                if fastest.candidate != DENSE
                else "Leave it dense: nothing that was tried is faster."
            )
        else:
            row = self.row(best)
            ratio = row.dense_over_this
            yield (
                f"Recommended: {best.code}: {ratio.value:.3g} times as fast as dense "
                f"({ratio.low:.3g} to {ratio.high:.3g})."
            )
            if fastest.candidate != best:
                yield (
                    f"{fastest.candidate.title} is faster still, but not {self.worth:g} times as "
                    "fast."
                )
        agreeing, others = self.decision.agreeing, self.decision.others
        if 2 * agreeing > votes:
            yield f"{agreeing} of {votes} turns say the same."
        else:
            yield (
                f"That is not sure: only {agreeing} of {votes} turns say the same. Measure longer "
                "(seconds, turns), and while nothing else runs here."
            )
        if others:
            yield f"Single turns speak for: {', '.join(each.title for each in others)}."


def _title(candidate: Candidate) -> str:
    return "without exchange" if candidate == ALONE else candidate.title


def _cells(prediction: Prediction, factor: float = 1.0) -> list[str]:
    value, low, high = (
        f"{factor * each:,.0f}" if factor * each >= 1000 else f"{factor * each:.3g}"
        for each in (prediction.value, prediction.low, prediction.high)
    )
    return [value, f"{low} to {high}"]
