"""Which step this is, and whether all ranks are in the same one."""

from __future__ import annotations

from collections.abc import Mapping

from hvd_dls.core.balancing.controller import Controller
from hvd_dls.core.wire.layout import Abandoned, Clock
from hvd_dls.core.wire.payload import Told
from hvd_dls.errors import RanksDisagreeError

_MODULO = 1 << 32  # of step numbers in a payload


class SessionClock:
    """Number of the step, and of the attempt to make it: every payload carries both.

    An attempt fails when a rank abandons the step: it tells the others, and all count it.

    Args:
        controller: which counts the steps that ended.
        grouped: whether ranks send for others, too.
        owners: whether these tell what they have been told.
    """

    def __init__(self, controller: Controller, grouped: bool = False, owners: bool = False) -> None:
        self._controller = controller
        self._where = " there or on a rank it sends for" if grouped else ""
        if grouped and owners:
            self._where = " there, on a rank it sends for, or on one that told it so"
        self._attempt = 0

    @property
    def now(self) -> Clock:
        """Of the step in progress, or the next one."""
        return Clock(self._controller.step % _MODULO, self._attempt)

    def start_step(self) -> None:
        """The step ended, or another one is to be made: the first attempt begins."""
        self._attempt = 0

    def abandon(self) -> None:
        """This attempt failed: on all ranks, once they hear of it."""
        self._attempt += 1

    def check(self, told: Mapping[int, Told]) -> None:
        """Compares what ranks say, by rank.

        Raises:
            RanksDisagreeError: some rank has given this attempt up, or is in another step.
        """
        own = self.now
        if gone := _who_say(Abandoned.GIVEN_UP, told):
            raise RanksDisagreeError(
                f"rank(s) {gone} gave step {own.step + 1} up, by an exception or abandon_step()"
                f"{self._where}, so it is given up on this rank, too; nothing of it entered a "
                "residual or a weight. Go on with a new step on all ranks"
            )
        clocks = {rank: payload.clock for rank, payload in sorted(told.items())}
        mixed = _who_say(Abandoned.OUT_OF_STEP, told)
        if not mixed and all(clock == own for clock in clocks.values()):
            return
        if all(clock.step == own.step for clock in clocks.values()):
            # To be the same from now on.
            self._attempt = max(own.attempt, *(clock.attempt for clock in clocks.values()))
        others = [
            f"rank {rank} in step {clock.step + 1}, attempt {clock.attempt + 1}"
            for rank, clock in clocks.items()
            if clock != own
        ]
        if mixed:
            others.append(f"ranks that rank(s) {mixed} send for are not all in the same one")
        raise RanksDisagreeError(
            f"this rank is in step {own.step + 1}, attempt {own.attempt + 1}, but "
            f"{', '.join(others)}: a step that ended on one was given up on the other, so their "
            "weights may differ. Give all ranks the same weights and states (a checkpoint) and go "
            "on"
        )


def _who_say(abandoned: Abandoned, told: Mapping[int, Told]) -> list[int]:
    return sorted(rank for rank, payload in told.items() if payload.abandoned == abandoned)
