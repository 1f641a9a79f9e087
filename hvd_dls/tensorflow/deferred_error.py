"""Holds a step's error back until Horovod has returned all gradients of the step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hvd_dls.errors import DLSError, NonFiniteGradientError


class DeferredError:
    """Raises a step's error with the step's last gradient.

    Not before: an error stops all operations of the graph that have not started, and other ranks
    would wait for ever for an allreduce that this rank never reached.

    Attributes:
        error: of the step in progress, or of the last one; None if it has none.
    """

    def __init__(self) -> None:
        self.error: DLSError | NonFiniteGradientError | None = None
        self._reduced = 0

    def begin_step(self) -> None:
        """Forgets the error of the step before."""
        self._reduced, self.error = 0, None

    @contextmanager
    def errors_kept(self) -> Iterator[None]:
        """Context whose errors are kept for the step's last gradient."""
        try:
            yield
        except (DLSError, NonFiniteGradientError) as error:
            self.error = self.error or error  # the first one: others follow from it

    @contextmanager
    def gradient_of(self, n_gradients: int) -> Iterator[None]:
        """Context in which one gradient is processed; errors are kept for the last.

        Args:
            n_gradients: of the whole step.

        Raises:
            NonFiniteGradientError: in the context of the step's last gradient.
            DLSError: as well.
        """
        with self.errors_kept():
            yield
        self._reduced += 1
        if self._reduced == n_gradients and self.error is not None:
            raise self.error
