"""What a compressor remembered at a commit of elastic training, and the way back to it.

All of this is local: Horovod may be broken when a rank goes back, and the ranks agree anew at their
next gradient anyway, as they do after every ``hvd.init()``.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from hvd_dls.adapter.compressor import BaseCompressor
from hvd_dls.core.session.session import Session

_log = logging.getLogger("hvd_dls")


class Commit:
    """Copies, on the host, of what a compressor has learnt and of what waits in its residuals.

    Args:
        compressor: whose; its state of now is committed.
    """

    def __init__(self, compressor: BaseCompressor) -> None:
        self._compressor = compressor
        self.save()

    def save(self) -> None:
        """Commits the state of now.

        Raises:
            DLSError: gradients are being written; or an error has left residuals half written.
        """
        self._sessions: weakref.WeakKeyDictionary[Any, Session] = weakref.WeakKeyDictionary()
        for binding in self._compressor._living():
            if binding.session is not None:
                self._sessions[binding] = binding.session.copy()
        self._loaded: list[Mapping[str, Any]] = list(self._compressor._loaded)

    def restore(self) -> None:
        """Goes back to what was committed last; a step in progress is forgotten.

        Residuals keep what they owe to the weights when the ranks agree anew, be they more or fewer
        than at the commit.
        """
        for binding in self._compressor._living():
            saved = self._sessions.get(binding)
            binding.go_back(saved and saved.copy())
        self._compressor._loaded[:] = self._loaded

    @property
    def steps(self) -> list[int]:
        """Of each model, how many steps it has made on this rank."""
        return [b.session.memory.controller.step for b in self._compressor._living() if b.session]

    def sync(self, broadcast: Callable[[Any], Any]) -> None:
        """Compares with rank 0 what each rank has learnt; together with all other ranks.

        Args:
            broadcast: gives rank 0's object to all ranks.
        """
        self.compare(broadcast(self.steps))

    def compare(self, first: list[int]) -> None:
        """Compares what this rank has learnt with rank 0.

        Nothing is copied from rank to rank: residuals are each rank's own, and ratios follow rank
        0's at the next gradient.  A state that was loaded by a rank that has come later is dropped,
        if rank 0 has trained already: it is older than the weights.

        Args:
            first: rank 0's ``steps``.
        """
        own = self.steps
        if first and not own and self._compressor._loaded:
            _log.warning(
                "the state that was loaded on this rank is dropped: the job it has joined has "
                "trained for %d steps already",
                max(first),
            )
            self._compressor._loaded.clear()
        if first and own and first != own:
            _log.warning(
                "residuals of this rank are of step(s) %s, the weights of rank 0's step(s) %s, as "
                "a failure came between the commits of the two; what this rank's residuals gained "
                "or lost in between is missing, or counts twice",
                own,
                first,
            )
