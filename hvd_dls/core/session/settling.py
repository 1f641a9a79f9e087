"""The second half of a step: residuals and sums are written, layer by layer, and the step ends."""

from __future__ import annotations

from collections import Counter
from time import perf_counter

import numpy as np

from hvd_dls.core.selection.backend import Array
from hvd_dls.core.session import log
from hvd_dls.core.session.ending import end_step
from hvd_dls.core.session.interrupts import Uninterrupted
from hvd_dls.core.session.owning import Owning
from hvd_dls.core.session.step import Step
from hvd_dls.core.wire.layout import ABSENT, NOT_FINITE
from hvd_dls.errors import DLSError, NonFiniteGradientError


class Settling(Owning):
    """Settles a step whose payloads have all arrived: see ``Session``."""

    def decompress(self, name: str, out: Array, scale: float = 1.0) -> None:
        """Adds up what all ranks sent of a layer; with the last layer, ends the step.

        Args:
            name: of a layer that went through ``compress`` or ``leave_out``.
            out: (n,) overwritten with the sum over ranks, at the latest when the step ends; added
                rank by rank and so the same bits on every rank; may be the gradient itself.  Its
                dtype is one that ``compress`` takes, and it is where the gradient is.  Zeros, or
                Inf (see ``marks_skipped``), if the step is skipped.
            scale: factor on the sum; or what the layer's backend takes for a number.

        Raises:
            DLSError: the layer, or a bucket of this step, has not arrived.
            NonFiniteGradientError: with nonfinite="raise", some rank's gradient held NaN or Inf; on
                every rank alike, in the first call of the step.  All residuals are as they were
                before the step.
        """
        step, backend = self._step, self._backends[name]
        if name not in step.arrived or name in step.settled:
            raise DLSError(f"layer {name!r}: decompressed, but not on its way")
        if name not in step.gradients and not (name in step.left_out and self.may_be_sparse(name)):
            raise DLSError(f"layer {name!r}: decompressed, but it went dense")
        self._check_arrived()
        with Uninterrupted():
            if step.refused:
                backend.fill(out, np.inf if self.marks_skipped else 0.0)
            else:
                self._settle(name, out, scale)
            self._settled(name)

    def accept(self, name: str, reduced: Array | None = None) -> bool:
        """Takes note that a layer that went dense has been reduced; with the last, ends the step.

        Args:
            name: of a layer that went through ``note`` or ``leave_out``.
            reduced: (n,) what came back, in a ``dense_step``, where the gradient was; else None.

        Returns:
            Whether it counts; not if the step is skipped.

        Raises:
            As ``decompress``; in a ``dense_step``, with the step's last layer.
        """
        step = self._step
        if name not in step.arrived or name in step.settled:
            raise DLSError(f"layer {name!r}: reduced, but not on its way")
        if name in step.gradients:
            raise DLSError(f"layer {name!r}: reduced, but it was compressed")
        if not self.dense_step:
            self._check_arrived()
        elif reduced is not None:
            backend = self._backends[name]
            if not backend.finite(reduced):
                before = step.refused.where if step.refused else []
                step.refused = NonFiniteGradientError([*before, (name, None)])
            elif self.memory.controller.measures_now and name in self._layers:
                step.whole[name] = backend.histogram(reduced)
        counts = step.refused is None
        self._settled(name)
        return counts

    def _settle(self, name: str, out: Array, scale: float) -> None:
        """Books what was sent of a layer and what came in; of one that is left out, the latter."""
        step, (bucket, position) = self._step, self.routing.position(name)
        backend, begun = self._backends[name], perf_counter()
        received = step.received[bucket].received(position)
        if name not in step.found:  # left out, or another rank's to send
            backend.sum_up(received, scale, out, self._layers[name].work_dtype)
            self.watch.seconds["settle"] += perf_counter() - begun
            return
        found = step.found[name]
        assert found is not None  # or the step would have been refused
        kept = step.kept[bucket][position]
        residual, gradient = self.residuals[name], step.gradients[name]
        self._writing = f"residuals of layer {name!r}"
        backend.settle(residual, gradient, found.indices, kept, received, scale, out)
        if self.memory.baseline is not None:
            self.memory.baseline.take_note(name, residual, found.values)
        self._writing = None
        self.watch.seconds["settle"] += perf_counter() - begun

    def _bring_to_end(self, step: Step) -> None:
        if step.refused is not None:
            self._end_refused(step)
            return
        for name in sorted(step.arrived - step.settled):
            with Uninterrupted():
                if name in step.gradients:
                    self._book(name)
                self._settled(name)

    def _book(self, name: str) -> None:
        """Settles a layer whose sum nobody asks for."""
        layer = self._layers[name]
        self._settle(name, self._backends[name].zeros(layer.size, layer.work_dtype), 1.0)

    def _check_arrived(self) -> None:
        """Before the first change: is everything there, and good?"""
        step = self._step
        if step.settled:
            return
        if missing := set(step.begun) - step.received.keys():
            raise DLSError(f"decompressed before buckets {sorted(missing)} were received")
        step.untouched = self.untouched = self._absent_everywhere()
        if not (where := step.layers_that_say(NOT_FINITE)):
            return
        step.refused = NonFiniteGradientError(where, of_hosts=self.grouped)
        if self.config.nonfinite == "raise":
            self._forget_step()
            raise step.refused
        self._refused = True

    def _absent_everywhere(self) -> frozenset[str]:
        """Layers of this step that no rank sent; those that did not come in are somebody else's."""
        said = Counter(name for name, _ in self._step.layers_that_say(ABSENT))
        voices = self.groups.count if self.owners is None else 1
        everywhere = {name for name, times in said.items() if times == voices}
        return frozenset(everywhere & self._step.arrived)

    def _settled(self, name: str) -> None:
        step = self._step
        if len(step.settled) + 1 < len(step.arrived):
            step.settled.add(name)  # one operation, which Ctrl-C cannot cut in two
            return
        with Uninterrupted():
            step.settled.add(name)
            self._end(step)

    def _end(self, step: Step) -> None:
        """All layers are settled."""
        if step.refused is not None:
            self._end_refused(step)
            return
        # What was sent for the other ranks of the group, of layers that did not come in here.
        for name in sorted(step.found.keys() - step.arrived):
            self._book(name)
        self._writing = "residuals"
        for backend in set(self._backends.values()):
            backend.finish()
        everyone = frozenset(layer.name for layer in self.plan.layers)
        self.missed = everyone - step.arrived
        self._step = Step(self.routing)
        self._writing = "velocities and ratios"
        self.last_step = end_step(self.memory, self._recorder, step, self.watch)
        self._writing = None
        self._clock.start_step()
        self.tally.add(self.last_step, self.skipped)
        for observe in self.observers:
            observe(self)

    def _end_refused(self, step: Step) -> None:
        assert step.refused is not None
        self._forget_step()
        if self.config.nonfinite == "raise":
            raise step.refused
        self._refused = True
        self.skipped += 1
        if self.rank == 0:
            log.skipped(self.skipped, step.refused.where, step.refused.of_hosts)
