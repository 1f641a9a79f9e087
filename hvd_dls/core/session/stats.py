"""What ``compression.stats()`` returns: numbers, a short table, a dictionary for JSON."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import numpy as np

from hvd_dls.core.session.stopwatch import PARTS, Seconds


@dataclass(frozen=True)
class Period:
    """What this rank did in some steps, added up.

    Attributes:
        steps: that were made.
        skipped: for NaN or Inf, before the last of them.
        entries: sent, of all compressed layers together (with ``hierarchical``, by each host).
        payloads: handed to allgather.
        repeated: those that were as long as in the step before: only for these can Horovod's
            response cache save a negotiation.  Whether it did, Horovod 0.28.1 tells nobody.
        sparse_bytes: of payloads, handed to allgather by this rank.
        dense_bytes: of gradients, handed to allreduce by this rank.
        host_bytes: handed to Horovod for this rank's own host (``hierarchical``).
        whole_bytes: of gradients, that dense training would have handed to allreduce.
        link_bytes: sent by this rank if Horovod's collectives are rings, as Gloo's and NCCL's are:
            an allgather passes each payload on to all ranks but one (with ``hierarchical``, hosts),
            an allreduce of n bytes sends 2 (P - 1) / P n.  Without ``host_bytes``.
        whole_link_bytes: the same of dense training.
        densities: (L,) share of each compressed layer's entries that was sent.
        density: the same of all together; 0 if nothing is compressed.
        seconds: where the time went.
        elapsed: seconds by the clock, from the end of the step before the first of them to the end
            of the last; what the training itself takes is in it.  A model's first step begins with
            its first gradient.
    """

    steps: int
    skipped: int
    entries: int
    payloads: int
    repeated: int
    sparse_bytes: int
    dense_bytes: int
    host_bytes: int
    whole_bytes: int
    link_bytes: int
    whole_link_bytes: int
    density: float
    elapsed: float
    seconds: Seconds
    densities: np.ndarray = field(compare=False)


@dataclass(frozen=True)
class Stats:
    """What compression did on this rank; its ``str`` is a short table.

    Attributes:
        rank: this one.
        world_size: number of ranks, P.
        step: number of the last step, from 1.
        layers: names of the L compressed layers.
        sizes: (L,) entries of each.
        bucket_bytes: of gradients that travel together, at most, but for layers that are larger:
            the option, or what was chosen for so many ranks.
        thresholds: (L,) smallest magnitude that was sent of each, in the last step; multiplied by
            ``loss_scale``, if there is one.
        spread: the largest of these over the smallest, of layers that sent ten entries or more;
            1 is ideal, NaN if there are not two of them.
        loss_scale: what the loss was multiplied by.
        skipped: steps skipped so far, those since the last one that was made among them.
        last: the last step.
        window: the last steps, as many as were asked for or have been.
        all: all steps, in this process.
    """

    rank: int
    world_size: int
    step: int
    layers: tuple[str, ...]
    sizes: np.ndarray = field(compare=False)
    bucket_bytes: int
    thresholds: np.ndarray = field(compare=False)
    spread: float
    loss_scale: float
    skipped: int
    last: Period
    window: Period
    all: Period

    def as_dict(self) -> dict[str, Any]:
        """Returns plain lists, dictionaries, strings and numbers; None for NaN and Inf."""
        plain: dict[str, Any] = plain_of(self)
        return plain

    def __str__(self) -> str:
        periods = (self.last, self.window, self.all)
        title = (
            f"step {self.step}, rank {self.rank} of {self.world_size}: "
            f"{len(self.layers)} layers of {int(self.sizes.sum()):,} entries, "
            f"spread {self.spread:.3g}, {self.skipped} step(s) skipped"
        )
        rows = [["", "last step", f"last {self.window.steps}", f"all {self.all.steps}"]]
        rows.append(["density", *(f"{p.density:.3%}" for p in periods)])
        rows.append(["entries sent a step", *(f"{_each(p, p.entries):,.0f}" for p in periods)])
        rows += [
            [label, *(bytes_text(_each(p, getattr(p, name))) for p in periods)]
            for label, name in (
                ("handed over a step", "sparse_bytes"),
                ("  + layers that go dense", "dense_bytes"),
                ("  + inside the host", "host_bytes"),
                ("  dense training", "whole_bytes"),
                ("sent over a ring", "link_bytes"),
                ("  dense training", "whole_link_bytes"),
            )
            if name != "host_bytes" or self.all.host_bytes
        ]
        for part in (*PARTS, "total"):
            each = [_each(p, getattr(p.seconds, part)) for p in periods]
            if any(each):
                rows.append([f"{part}, ms a step", *(f"{1e3 * x:.3g}" for x in each)])
        rows.append(["whole step, ms", *(f"{1e3 * _each(p, p.elapsed):.3g}" for p in periods)])
        rows.append(["payloads as long as before", *(_share(p) for p in periods)])
        return f"{title}\n{table(rows)}"


def table(rows: list[list[str]]) -> str:
    """Rows of equal length as lines, their columns aligned: the first to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def bytes_text(number: float) -> str:
    """A number of bytes, in words."""
    if number < 1000:
        return f"{number:.0f} B"
    for unit in ("kB", "MB", "GB"):
        number /= 1000
        if number < 999.5:
            return f"{number:.3g} {unit}"
    return f"{number:,.0f} GB"


def plain_of(value: Any) -> Any:
    """Dataclasses and arrays as what JSON has; None for NaN and Inf."""
    if is_dataclass(value):
        return {each.name: plain_of(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, dict):
        return {name: plain_of(each) for name, each in value.items()}
    if isinstance(value, np.ndarray | list | tuple):
        return [plain_of(x) for x in (value.tolist() if isinstance(value, np.ndarray) else value)]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _each(period: Period, number: float) -> float:
    return number / max(period.steps, 1)


def _share(period: Period) -> str:
    return f"{period.repeated / period.payloads:.0%}" if period.payloads else "-"
