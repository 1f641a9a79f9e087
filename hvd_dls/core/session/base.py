"""What a session is made of, and what can be asked of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from hvd_dls.config import DLSConfig
from hvd_dls.core.balancing.layers import LayerSpec
from hvd_dls.core.selection.backend import Array, Backend
from hvd_dls.core.session.clock import SessionClock
from hvd_dls.core.session.groups import Groups
from hvd_dls.core.session.memory import Memory
from hvd_dls.core.session.planning import make_plan
from hvd_dls.core.session.recorder import Recorder
from hvd_dls.core.session.routing import Routing
from hvd_dls.core.session.step import Step
from hvd_dls.core.session.stopwatch import Stopwatch
from hvd_dls.core.session.tally import Tally
from hvd_dls.core.session.telemetry import StepRecord
from hvd_dls.errors import DLSError


class SessionBase:
    """One model's plan, what is remembered of it, and the step in progress: see ``Session``."""

    def __init__(
        self,
        layers: Sequence[LayerSpec],
        config: DLSConfig,
        world_size: int,
        rank: int = 0,
        norms: Mapping[str, float] | None = None,
        backends: Mapping[str, Backend] | None = None,
        groups: Groups | None = None,
        planned_for: int | None = None,
    ) -> None:
        self.config = config
        self.planned_for = planned_for
        self._norms = norms
        self.groups = groups or Groups.of_one(world_size, rank)
        self.plan = make_plan(layers, config, planned_for or self.groups.count)
        self.routing = Routing(self.plan, config, self.groups)
        self.memory = Memory(self.plan, config, self.groups, self.routing, norms, backends)
        self._layers = {layer.name: layer for layer in self.plan.sparse}
        self._row = {layer.name: row for row, layer in enumerate(self.plan.sparse)}
        self._backends = self.memory.backends
        self.watch = Stopwatch()
        self._recorder = Recorder(self.plan, config, self.memory, self.watch)
        self.tally = Tally(self.plan, self.groups, self.routing.limit)
        self.observers: Sequence[Callable[[SessionBase], None]] = ()
        owners, grouped = self.memory.owners is not None, not self.groups.trivial
        self._clock = SessionClock(self.memory.controller, grouped, owners)
        self._step = Step(self.routing)
        # How often each bucket was exchanged, or is being; and, last, how many steps have begun.
        self._rounds = np.zeros(len(self.routing.buckets) + 1, np.int64)
        self._refused = False
        self._writing: str | None = None  # what is being changed, and is spoiled if that fails
        self.skipped = 0
        self.marks_skipped = False
        self.untouched: frozenset[str] = frozenset()
        self.missed: frozenset[str] = frozenset()
        self.last_step: StepRecord | None = None

    @property
    def world_size(self) -> int:
        """Number of ranks, P."""
        return self.groups.world_size

    @property
    def rank(self) -> int:
        """This one's number among them."""
        return self.groups.rank

    # What is known of a layer, and of the step --------------------------------------------------

    @property
    def k(self) -> np.ndarray:
        """(L,) entries each sparse layer sends in the current step, as far as ranks agree on it."""
        return self.memory.controller.k

    @property
    def residuals(self) -> dict[str, Array]:
        """(n,) of each compressed layer that this rank sends, by name."""
        return self.memory.residuals

    def is_sparse(self, name: str) -> bool:
        """Whether a layer is compressed in the current step."""
        return name in self._layers and not self.memory.controller.dense

    def may_be_sparse(self, name: str) -> bool:
        """Whether a layer is compressed in some steps."""
        return name in self._layers

    def takes_part(self, name: str) -> bool:
        """Whether there is anything to do for a layer, compressed or not."""
        return self.bucket_of(name) is not None or not self.routing.buckets or self.corrects

    def bucket_of(self, name: str) -> int | None:
        """Number of the bucket that a layer travels in, or that tells whether it is finite."""
        return self.routing.bucket_of(name)

    @property
    def in_step(self) -> bool:
        """Whether a step has begun and not ended."""
        return bool(self._step.arrived)

    def has(self, name: str) -> bool:
        """Whether a layer has come in, in the step in progress."""
        return name in self._step.arrived

    @property
    def dense_step(self) -> bool:
        """Whether the current step sends whole gradients, and their sums must be looked at.

        Without payloads nothing else tells of NaN and Inf.
        """
        return self.memory.controller.dense or not self.routing.buckets

    @property
    def dense_steps(self) -> int:
        """Number of steps at first that send whole gradients."""
        return self.memory.controller.dense_steps

    @property
    def corrects(self) -> bool:
        """Whether gradients that go dense must go through ``correct`` first."""
        return self.memory.correction.active or bool(self.memory.leftovers)

    @property
    def refused(self) -> bool:
        """Whether the step in progress, or the last one if none has begun since, is skipped."""
        return self._refused

    @property
    def loss_scale(self) -> float:
        """What residuals and velocities are multiplied by."""
        return self.memory.loss_scale

    # The step in progress -----------------------------------------------------------------------

    def _begin(self) -> None:
        self._check_sound()
        self._refused, self.untouched = False, frozenset()

    def _close(self, bucket: int) -> None:
        """No more layers come in of a bucket, and this rank takes part in its exchange."""
        if bucket not in self._step.closed:
            self._step.closed.add(bucket)
            self._rounds[bucket] += 1

    def _forget_step(self) -> None:
        self._step = Step(self.routing)
        self.memory.correction.forget()
        self.watch.reset()

    def _check_sound(self) -> None:
        """Refuses to go on from what an error has left half written."""
        if self._writing is not None:
            raise DLSError(
                f"an error came while {self._writing} were being written, so what this rank "
                "remembers cannot be used: load a saved state on all ranks, or begin anew"
            )

    def _k_of(self, bucket: int) -> np.ndarray:
        k: np.ndarray = self.k[self.routing.rows[bucket]]
        return k
