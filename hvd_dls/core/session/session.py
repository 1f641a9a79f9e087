"""One model's compression on one rank: a gradient in, a payload out; all payloads in, a sum out.

A step is a transaction.  What comes in is only looked at; nothing changes until the payloads of all
ranks are there and none of them tells of NaN or Inf.  Until then a step can be abandoned.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from hvd_dls.core.session import log
from hvd_dls.core.session.gathering import Farewell
from hvd_dls.core.session.settling import Settling
from hvd_dls.errors import DLSError


class Session(Settling):
    """Compresses the gradients of one model.

    In a step, each layer that ``is_sparse`` goes through ``compress``, each other one through
    ``note``, or either through ``leave_out``; each bucket that is complete through ``payload``, the
    network, and ``receive``; then each layer through ``decompress`` or ``accept``.  When all have,
    the step ends and the ratios move.  A bucket of which only some layers take part in a step is
    among ``unfinished`` in the end.  Where ranks are ``grouped``, there is more around the network:
    see ``Averaging``; and where owners add up, see ``Owning``.

    Args:
        layers: all parameters, in model order.
        config: the options.
        world_size: number of ranks, P.
        rank: this one's number among them.
        norms: Frobenius norm of each layer's weights, for prior="weight_norm".
        backends: where arrays of layers are that are not on the host, by name.
        groups: ranks that average their gradients before one of them sends for all, and this one's
            place among them; None: each rank sends for itself.  ``world_size`` and ``rank`` are
            the groups' then.
        planned_for: number of ranks by which it is decided which layers are compressed; None: as
            many as send.

    Attributes:
        residuals: (n,) of each compressed layer, by name.
        skipped: steps that were skipped for NaN or Inf.
        marks_skipped: whether the gradients of a skipped step become Inf, for who applies them to
            see; otherwise zero.
        untouched: layers that came in and took no part on any rank, in the step in progress or in
            the last one.
        missed: layers that did not come in at all in the last step.
        last_step: what happened in the last step that was not skipped.
        tally: what happened in all of them.
        watch: where the time of the step in progress goes.
        observers: called when a step has ended that was not skipped, on the training's own thread:
            they must be quick and raise nothing.

    Raises:
        DLSError: see ``make_plan`` and ``make_buckets``.
    """

    def abandon(self) -> dict[int, Farewell]:
        """Gives the step in progress up: residuals and velocities are as they were before it.

        If some layer's sum has been written already, other ranks count the step as one that was
        made; so it is brought to its end, from what has come in.  If it is one that is skipped, it
        is skipped.  (In a ``dense_step`` nothing is written before the end.)

        Returns:
            What is to be sent, by bucket, of those that were not sent: it tells the other ranks,
            who may be waiting for it.
        """
        step, farewell = self._step, self._farewell()
        if not step.arrived:
            return farewell
        if self._writing is not None:
            self._forget_step()
        elif step.settled and not self.dense_step:
            self._bring_to_end(step)
        else:
            for bucket in farewell:
                self._close(bucket)
            self._clock.abandon()
            self._forget_step()
        return farewell

    @property
    def rounds(self) -> np.ndarray:
        """(buckets + 1,) how often this rank has taken part: in each bucket's exchange, in steps.

        As it is once the step in progress, if there is one, is given up.
        """
        rounds = self._rounds.copy()
        rounds[[bucket for bucket in self._farewell() if bucket not in self._step.closed]] += 1
        return rounds

    def sit_out(self, rounds: np.ndarray) -> list[dict[int, Farewell]]:
        """Takes part, with nothing, in what other ranks have begun and given up, and this one not.

        Otherwise that would meet what this rank sends in its next step.

        Args:
            rounds: of all ranks, the largest: see ``rounds``; no step is in progress.

        Returns:
            What is to be sent, by bucket: one after the other.
        """
        farewells = []
        while (behind := np.flatnonzero(self._rounds[:-1] < rounds[:-1])).size:
            farewells.append(self._farewell_of(behind.tolist()))
            self._rounds[behind] += 1
        self._rounds[-1] = rounds[-1]
        return farewells

    def scale_to(self, loss_scale: float) -> None:
        """Tells what the loss, and so each gradient to come, is multiplied by.

        Raises:
            DLSError: it is not a finite number > 0, or a step is in progress.
        """
        if loss_scale == self.loss_scale:
            return
        if self.in_step:
            raise DLSError(
                f"the loss scale changed from {self.loss_scale} to {loss_scale} within a step"
            )
        self.memory.scale_to(loss_scale)

    def agreed(self) -> np.ndarray:
        """Step and ratios, int64, which rank 0 hands to the others."""
        return self.memory.agreed()

    def agree(self, agreed: np.ndarray) -> None:
        """Takes over rank 0's ``agreed()``, before the first step of all ranks together."""
        self.memory.agree(agreed)
        self._clock.start_step()

    def announce(self) -> None:
        """Logs what will happen, on rank 0."""
        if self.rank == 0:
            owners = self.owners is not None
            log.started(self.plan, self.routing, self.k.tolist(), self.world_size, owners)

    def inherit(self, other: Session, factor: float = 1.0) -> None:
        """Takes over what another session of the same model remembers: see ``Memory.inherit``."""
        other._check_sound()
        self.memory.inherit(other.memory, factor)
        self.skipped, self.last_step = other.skipped, other.last_step
        self.marks_skipped, self.missed = other.marks_skipped, other.missed
        self.tally.inherit(other.tally)

    def copy(self) -> Session:
        """Another session that remembers the same: in no step, all of its arrays on the host.

        Raises:
            DLSError: see ``state_dict``.
        """
        self._check_whole("a copy")
        other = Session(
            self.plan.layers,
            self.config,
            self.world_size,
            self.rank,
            self._norms,
            groups=self.groups,
            planned_for=self.planned_for,
        )
        other.inherit(self)
        return other

    def state_dict(self) -> dict[str, Any]:
        """This rank's training state: plain values and arrays (the large ones are not copied).

        In a step that gathers, the state is that of before the step.

        Raises:
            DLSError: some layers of the step in progress have been settled and others not.
        """
        self._check_whole("state_dict()")
        return self.memory.state()

    def _check_whole(self, what: str) -> None:
        if self._step.settled and self._step.refused is None:
            raise DLSError(
                f"{what} while gradients are being written: call it after optimizer.step(), "
                "or after abandon_step()"
            )
        self._check_sound()

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Whether a saved state fits: see ``Memory.check``."""
        self.memory.check(state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a saved state, copying it; a step in progress is forgotten.

        Raises:
            StateMismatchError: see ``Memory.check``; nothing has changed then.
        """
        state = self.memory.check(state)
        self._forget_step()
        self._writing = "loaded residuals"
        self.memory.load(state)
        self._writing = None
        self._clock.start_step()
