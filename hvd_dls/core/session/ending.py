"""What a step leaves behind when it ends: velocities, thresholds, ratios, a record."""

from __future__ import annotations

from time import perf_counter

import numpy as np

from hvd_dls.core.balancing.plan import measured_k
from hvd_dls.core.session import log
from hvd_dls.core.session.memory import Memory
from hvd_dls.core.session.recorder import Recorder
from hvd_dls.core.session.step import Step
from hvd_dls.core.session.stopwatch import Stopwatch
from hvd_dls.core.session.telemetry import StepRecord


def end_step(memory: Memory, recorder: Recorder, step: Step, watch: Stopwatch) -> StepRecord:
    """Ends a step that counts, once all its layers are settled.

    Args:
        memory: of the rank.
        recorder: of the model.
        step: that ends.
        watch: of it.

    Returns:
        What happened in it.
    """
    begun = perf_counter()
    found = {name: f for name, f in step.found.items() if f is not None}
    memory.correction.commit({name: f.indices for name, f in found.items()})
    if memory.owners is not None:
        memory.owners.commit(
            {bucket: (own, step.rounding[bucket]) for bucket, own in step.merged.items()}
        )
    memory.forget_leftovers(step.arrived - step.stayed_away)
    memory.thresholds |= step.thresholds_in_group(memory.groups.own)
    for name, f in found.items():
        memory.thresholds[name] = f.threshold
    controller = memory.controller
    if controller.dense:
        controller.advance()
        record = recorder.record_whole(step)
        if step.whole:
            controller.start_from(
                measured_k(memory.plan, memory.config, step.whole, controller.density)
            )
        return record
    k = controller.k.copy()
    if memory.baseline is not None:
        k = np.array([len(found[x.name].indices) if x.name in found else 0 for x in memory.layers])
    _advance(memory, step)
    watch.seconds["balance"] += perf_counter() - begun
    return recorder.record(step, k)


def _advance(memory: Memory, step: Step) -> None:
    """Moves the ratios, and tells of layers that lose or regain their share."""
    controller, n_layers = memory.controller, len(memory.layers)
    before = controller.attendance.live
    rows = np.flatnonzero(step.present(n_layers))
    if memory.baseline is None:
        controller.advance(rows, *step.sketches(rows, n_layers))
    else:
        controller.advance(rows)
        memory.baseline.start_step(controller.density, controller.attendance)
    live = controller.attendance.live
    if memory.groups.rank == 0 and (live != before).any():
        gone, back = np.flatnonzero(before & ~live), np.flatnonzero(live & ~before)
        if len(gone):
            steps = int(controller.attendance.away[gone].max())
            log.share_given_away([memory.layers[row].name for row in gone], steps)
        if len(back):
            log.share_given_back([memory.layers[row].name for row in back])
