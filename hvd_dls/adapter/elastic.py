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
        self._compressor._loaded.date()
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

    @property
    def told(self) -> tuple[list[int], bool]:
        """What other ranks compare with: ``steps``, and whether there is a state from before.

        Such a state was loaded when ranks were others, and no model has taken it yet.
        """
        return self.steps, self._compressor._loaded.of_former_ranks

    def sync(self, broadcast: Callable[[Any], Any]) -> None:
        """Compares with rank 0 what each rank has learnt; together with all other ranks.

        Args:
            broadcast: gives rank 0's object to all ranks.
        """
        self.compare(*broadcast(self.told))

    def compare(self, first: list[int], has_loaded: bool = False) -> None:
        """Compares what this rank has learnt with rank 0, which has been there for longest.

        Nothing is copied from rank to rank: residuals are each rank's own, and ratios follow rank
        0's at the next gradient.  A state that was loaded by a rank that has come later is dropped,
        if rank 0 has trained already, as it is older than the weights; and if rank 0 is to go on
        from what it has loaded itself, as residuals of ranks that are gone are lost.

        Args:
            first: rank 0's ``steps``.
            has_loaded: the rest of what rank 0 ``told``.
        """
        own, loaded = self.steps, self._compressor._loaded
        if not own and loaded and (first or (has_loaded and not loaded.of_former_ranks)):
            done = f"trained for {max(first)} steps already" if first else "loaded one before"
            _log.warning(
                "the state that was loaded on this rank is dropped: the job it has joined has %s",
                done,
            )
            loaded.clear()
            self._loaded = []
        if first and own and first != own:
            _log.warning(
                "residuals of this rank are of step(s) %s, the weights of rank 0's step(s) %s, as "
                "a failure came between the commits of the two; what this rank's residuals gained "
                "or lost in between is missing, or counts twice",
                own,
                first,
            )
