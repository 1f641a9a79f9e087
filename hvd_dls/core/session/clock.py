"""Which step this is, and whether all ranks are in the same one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hvd_dls.core.balancing.controller import Controller
from hvd_dls.core.wire.layout import Clock
from hvd_dls.errors import RanksDisagreeError

_MODULO = 1 << 32  # of step numbers in a payload


class SessionClock:
    """Number of the step, and of the attempt to make it: every payload carries both.

    An attempt fails when a step is abandoned.  What a rank had sent by then may meet what others
    send in their next attempt; the numbers tell.

    Args:
        controller: which counts the steps that ended.
    """

    def __init__(self, controller: Controller) -> None:
        self._controller = controller
        self._attempt = 0

    @property
    def now(self) -> Clock:
        """Of the step in progress, or the next one."""
        return Clock(self._controller.step % _MODULO, self._attempt)

    def start_step(self) -> None:
        """The step ended, or another one is to be made: the first attempt begins."""
        self._attempt = 0

    def abandon(self) -> None:
        """This attempt failed."""
        self._attempt += 1

    def agrees_with(self, clocks: Sequence[Clock]) -> bool:
        """Compares the numbers of all ranks' payloads.

        Returns:
            Whether all are this rank's; if not, some are of attempts that failed, and the payloads
            must be gathered once more.

        Raises:
            RanksDisagreeError: some rank is in another step; or it has abandoned this attempt,
                which has failed then on this rank, too.
        """
        steps = np.array([clock.step for clock in clocks])
        attempts = np.array([clock.attempt for clock in clocks])
        own = self.now
        if (steps != own.step).any():
            other = {int(rank): int(steps[rank]) for rank in np.flatnonzero(steps != own.step)}
            raise RanksDisagreeError(
                f"this rank is in step {own.step + 1}, but "
                + ", ".join(f"rank {rank} in step {step + 1}" for rank, step in other.items())
                + ": a step that ended on one was abandoned on the other, so their weights may "
                "differ. Give all ranks the same weights and states (a checkpoint) and go on"
            )
        newest = int(attempts.max())
        if newest > own.attempt:
            self._attempt = newest
            ranks = np.flatnonzero(attempts == newest).tolist()
            raise RanksDisagreeError(
                f"rank(s) {ranks} abandoned step {own.step + 1} and began it again, so it is "
                "abandoned on this rank, too; nothing of it entered a residual. Begin the next "
                "step on all ranks"
            )
        return bool((attempts == newest).all())
