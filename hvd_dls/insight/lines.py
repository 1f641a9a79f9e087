"""What a line of a log holds.  docs/insight.md describes each field."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

import hvd_dls
from hvd_dls.core.session.base import SessionBase
from hvd_dls.core.session.stats import Period, plain_of
from hvd_dls.core.session.telemetry import StepRecord

VERSION = 1  # of the format: changed when a field's meaning changes, not when one is added
MODEL, STEP = "model", "step"  # kinds of lines


@dataclass(frozen=True)
class Told:
    """What a log is told of a step: nothing in it changes any more.

    Attributes:
        model: number of the model in the log, from 0.
        record: of the step.
        period: the steps since the last line.
        skipped: steps of the model so far that were skipped.
    """

    model: int
    record: StepRecord
    period: Period
    skipped: int


def model_line(number: int, session: SessionBase) -> dict[str, Any]:
    """The line that comes before a model's first step, and again if it goes on elsewhere."""
    plan, groups = session.plan, session.groups
    config = session.config.as_plain()
    line: dict[str, Any] = plain_of(
        {
            "kind": MODEL,
            "version": VERSION,
            "hvd_dls": hvd_dls.__version__,
            "model": number,
            "rank": groups.rank,
            "world_size": groups.world_size,
            "senders": groups.count,
            "options": {name: _plain(value) for name, value in config.items()},
            "layers": [layer.name for layer in plan.sparse],
            "sizes": plan.sizes,
            "dense_layers": len(plan.dense),
            "dense_entries": sum(layer.size for layer, _ in plan.dense),
        }
    )
    return line


def step_line(told: Told) -> dict[str, Any]:
    """The line of a step: its own ratios and thresholds, and sums over the steps it tells of."""
    record, period = told.record, told.period
    line = {
        "kind": STEP,
        "model": told.model,
        "step": record.step,
        "time": round(record.time, 3),
        "k": record.k,
        "thresholds": [_short(value) for value in record.thresholds.tolist()],
        "spread": _short(record.threshold_spread()),
        "loss_scale": record.loss_scale,
        "skipped_so_far": told.skipped,
    }
    line |= {name: value for name, value in vars(period).items() if name != "densities"}
    line["seconds"] = {name: round(value, 7) for name, value in vars(period.seconds).items()}
    line["elapsed"], line["density"] = round(period.elapsed, 6), _short(period.density)
    if record.quality is not None:
        line["energy"] = record.quality.energy
        line["misallocation"] = record.quality.misallocation
    plain: dict[str, Any] = plain_of(line)
    return plain


def scalars_of(told: Told) -> dict[str, float]:
    """What TensorBoard draws of a step, by name."""
    record, period = told.record, told.period
    thresholds = record.thresholds[record.thresholds > 0] / record.loss_scale
    each = {
        "density": period.density,
        "spread": record.threshold_spread(),
        "skipped steps": float(told.skipped),
        "bytes/handed over": (period.sparse_bytes + period.dense_bytes) / period.steps,
        "bytes/dense training": period.whole_bytes / period.steps,
        "bytes/over a ring": period.link_bytes / period.steps,
        "bytes/dense training over a ring": period.whole_link_bytes / period.steps,
        "ms/whole step": 1e3 * period.elapsed / period.steps,
    }
    for name, value in vars(period.seconds).items():
        each[f"ms/{name}"] = 1e3 * value / period.steps
    if thresholds.size:
        each |= {
            "threshold/smallest": float(thresholds.min()),
            "threshold/median": float(np.median(thresholds)),
            "threshold/largest": float(thresholds.max()),
        }
    if record.quality is not None:
        each |= {"energy": record.quality.energy, "misallocation": record.quality.misallocation}
    prefix = f"dls.{told.model}" if told.model else "dls"
    return {f"{prefix}/{name}": value for name, value in each.items() if np.isfinite(value)}


def _short(value: float) -> float:
    """Six digits are enough to draw it."""
    return float(f"{value:.6g}")


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | int | float | list | None) else str(value)
