"""The record of each step that has ended."""

from __future__ import annotations

import time

import numpy as np

from hvd_dls.config import DLSConfig
from hvd_dls.core.balancing.plan import Plan
from hvd_dls.core.session.memory import Memory
from hvd_dls.core.session.step import Step
from hvd_dls.core.session.stopwatch import Stopwatch
from hvd_dls.core.session.telemetry import Quality, StepRecord, measure_quality


class Recorder:
    """Tells what happened in a step, once the ratios have moved.

    Args:
        plan: the layers and their budget.
        config: the options.
        memory: of the rank.
        watch: of the step that ends.
    """

    def __init__(self, plan: Plan, config: DLSConfig, memory: Memory, watch: Stopwatch) -> None:
        self._plan, self._memory, self._watch = plan, memory, watch
        self._sizes = plan.sizes
        self._lengths: dict[int, int] = {}  # of the last step's payloads, by bucket
        self._names = tuple(layer.name for layer in plan.sparse)
        self._measure_every = config.measure_every

    def record(self, step: Step, k: np.ndarray) -> StepRecord:
        """Of a step in which each layer sent k entries, (L,)."""
        every = self._measure_every
        measures = every and self._memory.controller.step % every == 0
        quality = self._quality(step) if measures else None
        before, self._lengths = self._lengths, step.sent
        return StepRecord(
            step=self._memory.controller.step,
            time=time.time(),
            names=self._names,
            sizes=self._sizes,
            k=k,
            thresholds=np.array(list(self._memory.thresholds.values())),
            sparse_bytes=sum(step.sent.values()),
            dense_bytes=self._plan.dense_bytes,
            quality=quality,
            host_bytes=step.host_bytes,
            payloads=len(step.sent),
            repeated=sum(before.get(bucket) == length for bucket, length in step.sent.items()),
            loss_scale=self._memory.loss_scale,
            seconds=self._watch.lap(),
        )

    def record_whole(self, step: Step) -> StepRecord:
        """Of a step that sent whole gradients."""
        layers = self._plan.layers
        return StepRecord(
            step=self._memory.controller.step,
            time=time.time(),
            names=self._names,
            sizes=self._sizes,
            k=self._sizes,
            thresholds=np.zeros(len(self._names)),
            sparse_bytes=0,
            dense_bytes=sum(x.size * x.itemsize for x in layers if x.name in step.arrived),
            loss_scale=self._memory.loss_scale,
            seconds=self._watch.lap(),
        )

    def _quality(self, step: Step) -> Quality:
        """Of all layers that this rank sends, those that took no part counting for nothing."""
        sent, left, nothing = [], [], np.empty(0, np.float32)
        for name in self._names:
            found = step.found.get(name)  # not of what another rank of the group sends
            sent.append(found.values if found else nothing)
            left.append(
                self._memory.backends[name].to_host(self._memory.residuals[name])
                if found
                else nothing
            )
        return measure_quality(sent, left)
