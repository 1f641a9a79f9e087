"""Ranks with different numbers of batches: who has no more takes part with zeros.

Horovod's own ``hvd.join()`` does not work with allgather, which is how payloads travel.  So before
each step all ranks tell each other whether they make one because they have data, and those that
have none make it, too, with gradients of zeros, through Horovod's optimizer and so through the
compressor.  A rank with data begins to tell at its first gradient, and asks for the answers once
all gradients are reduced: it does not wait.
"""

from __future__ import annotations

import contextlib
import weakref
import zlib
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import horovod.torch as hvd
import numpy as np
import torch
from horovod.common.exceptions import HorovodInternalError
from torch.autograd.graph import register_multi_grad_hook

from hvd_dls.core.session.session import Session
from hvd_dls.errors import DLSError, NonFiniteGradientError, RanksDisagreeError
from hvd_dls.torch import watching
from hvd_dls.torch.bookkeeping import names_and_parameters, no_rows, rest_of
from hvd_dls.torch.compressor import DLSCompressor, compressor_of
from hvd_dls.torch.exchange import finish, gather, start
from hvd_dls.torch.refusals import refuse_adasum
from hvd_dls.torch.rounds import Habits, Intent, Rounds, Word

_NAME = "hvd_dls.join"  # of the operations; Horovod's stall report shows it where a rank is missing
_habits: weakref.WeakKeyDictionary[Any, Habits] = weakref.WeakKeyDictionary()
_times: dict[int, int] = {}  # how often ranks of a process set have come in, by its id


class Joining:
    """The ranks' loops over their batches: see ``join``.

    Attributes:
        last_rank: a rank (of all ranks of the job) that had data in the last step; -1 before one.
        extra_steps: steps that this rank took part in without data.
    """

    def __init__(self, optimizer: Any, compressor: DLSCompressor, step: Callable[[], Any]) -> None:
        self.last_rank = -1
        self.extra_steps = 0
        self._optimizer, self._compressor, self._step = optimizer, compressor, step
        self._process_set: hvd.ProcessSet = optimizer.process_set
        self._parameters: list[torch.Tensor] = []
        self._rounds: Rounds | None = None
        self._without_data = False  # whether this rank's loop is over
        self._owes = False  # whether others have begun a step that this rank has not
        self._singly: set[int] = set()  # ids of what Horovod reduces singly in this step
        # Before the first step nobody knows how Horovod reduces what: the first backward tells.
        self._watched: Any = None
        self._asking = False
        self._answers: int | None = None

    # Coming in ----------------------------------------------------------------------------------

    def __enter__(self) -> Joining:
        if not self._process_set.included() or self._process_set.size() == 1:
            return self
        optimizer = self._optimizer
        refuse_adasum(optimizer)
        if watching.current is not None:
            raise DLSError("join() within join(): only one optimizer can be joined at a time")
        self._compressor.binding_of(optimizer).start(optimizer)
        self._parameters = [parameter for _, parameter in names_and_parameters(optimizer)]
        n = len(self._parameters)
        set_id = self._process_set.process_set_id
        own, known = Word(Intent.STEP, 0, _habits.get(optimizer)), _times.get(set_id, 0)
        head = np.array([known], np.int64).view(np.uint8)
        gathered = gather(_NAME, np.concatenate([head, own.encode(n)]), self._process_set)
        rows = gathered.reshape(self._process_set.size(), -1)
        _times[set_id] = int(rows[:, :8].copy().view(np.int64).max()) + 1
        self._know([Word.decode(row[8:], n) for row in rows])
        self._rounds = Rounds(f"{_NAME}.{set_id}", self._process_set, n)
        if optimizer not in _habits:
            self._asking = True
            self._watched = register_multi_grad_hook(self._parameters, self._answer)
        watching.current = self
        return self

    @property
    def _session(self) -> Session:
        session = self._compressor.binding_of(self._optimizer).session
        assert session is not None
        return session

    # Steps with data ----------------------------------------------------------------------------

    def step_begins(self, optimizer: Any) -> None:
        """Tells the others that this rank makes a step, if it is one with data.

        Raises:
            RanksDisagreeError: see ``before_update``.
        """
        if self._without_data:
            return
        self._check()
        self._tell(Intent.STEP)
        if self._asking and torch._C._current_graph_task_id() == -1:  # not in backward
            self._answer([parameter.grad for parameter in self._parameters])

    def handed_over(self, optimizer: Any, parameter: torch.Tensor | None) -> None:
        """Refuses other optimizers, and notes what Horovod reduces alone that is of a group.

        Raises:
            DLSError: the optimizer is not the one that is joined.
        """
        if optimizer is not self._optimizer:
            raise DLSError(
                "an optimizer steps within join(...) of another one: ranks without data would not "
                "take part. One optimizer can be joined, and others step outside of join()"
            )
        if optimizer._groups is not None and parameter is not None:
            self._singly.add(id(parameter))

    def before_update(self, optimizer: Any) -> None:
        """Compares what the ranks have told at the step's beginning, before weights change.

        Raises:
            RanksDisagreeError: a rank has left by an exception, or its optimizer has other options;
                on every rank alike.
        """
        if optimizer is not self._optimizer:
            return
        self._hear_answers()
        self._check()
        if not self._without_data:
            sparse = [p.grad is not None and p.grad.is_sparse for p in self._parameters]
            singly = [id(p) in self._singly for p in self._parameters]
            _habits[optimizer] = Habits(np.array(sparse, bool), np.array(singly, bool))
        self._singly.clear()

    def _tell(self, intent: Intent) -> None:
        assert self._rounds is not None
        options = zlib.crc32(repr(self._options()).encode())
        self._rounds.tell(Word(intent, options, _habits.get(self._optimizer)))

    def _options(self) -> list[dict[str, Any]]:
        """What an update depends on besides gradients, of each group of parameters."""
        return [
            {
                key: value.tolist() if isinstance(value, torch.Tensor) else value
                for key, value in sorted(group.items())
                if key != "params"
            }
            for group in self._optimizer.param_groups
        ]

    def _hear(self) -> list[Word]:
        assert self._rounds is not None
        words = self._rounds.heard()
        for rank, word in reversed(list(enumerate(words))):
            if word.intent is Intent.STEP:
                self.last_rank = self._process_set.ranks[rank]
        return words

    def _check(self) -> None:
        words = self._hear()
        left = self._who(Intent.LEAVE)
        if left:
            raise RanksDisagreeError(
                f"rank(s) {left} left join(...) by an exception, which is in their own output: "
                "the other ranks end their loops, too"
            )
        if len({word.options for word in words}) > 1:
            done, going = self._who(Intent.WAIT), self._who(Intent.STEP)
            raise RanksDisagreeError(
                "the optimizer's options (learning rate, ...) differ between ranks, so their "
                f"weights would; here they are {self._options()}. Rank(s) {going or 'none'} have "
                f"data, rank(s) {done or 'none'} have no more. What changes options in the loop, "
                "as a scheduler, must run on ranks without data, too: give join() a function, "
                "step=, that makes the optimizer's step and the scheduler's, and that the loop "
                "calls, too"
            )

    def _who(self, intent: Intent) -> list[int]:
        ranks = self._process_set.ranks
        return [ranks[i] for i, word in enumerate(self._hear()) if word.intent is intent]

    # How Horovod reduces what -------------------------------------------------------------------

    def _answer(self, gradients: Sequence[torch.Tensor | None]) -> None:
        """Tells, in the first backward of all, what ranks without data cannot know."""
        if not self._asking:
            return
        self._asking = False
        there = {id(p) for p, g in zip(self._parameters, gradients, strict=True) if g is not None}
        groups = [{id(p) for p in group} for group in self._optimizer._group_counts]
        split = [ids for ids in groups if there and not ids <= there]
        sparse = [g is not None and g.is_sparse for g in gradients]
        singly = [any(id(p) in ids for ids in split) for p in self._parameters]
        habits = Habits(np.array(sparse, bool), np.array(singly, bool))
        set_id = self._process_set.process_set_id
        word = Word(Intent.STEP, 0, habits).encode(len(habits.sparse))
        name = f"{_NAME}.{set_id}.{_times[set_id]}"
        self._answers = start(name, word, self._process_set)

    def _hear_answers(self) -> None:
        if self._answers is None:
            return
        answers, self._answers = finish(self._answers), None
        n = len(self._parameters)
        self._know([Word.decode(row, n) for row in answers.reshape(self._process_set.size(), -1)])

    def _know(self, words: Sequence[Word]) -> None:
        known = [word.habits for word in words if word.habits is not None]
        if known:
            _habits[self._optimizer] = Habits.of_all(known)

    # Steps without data -------------------------------------------------------------------------

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if watching.current is not self:
            return
        try:
            if error is None:
                self._go_on_without_data()
            elif isinstance(error, Exception) and not isinstance(error, HorovodInternalError):
                with contextlib.suppress(HorovodInternalError):
                    self._leave()
        finally:
            watching.current = None
            if self._watched is not None:
                self._watched.remove()

    def _go_on_without_data(self) -> None:
        """Takes part until no rank has data."""
        met: Exception | None = None
        try:
            if self._session.in_step:
                self._step()
            self._without_data = True
            while True:
                self._check()
                self._tell(Intent.WAIT)
                if not self._who(Intent.STEP):
                    self._check()
                    return
                self._owes = True
                if self._who(Intent.LEAVE):
                    self._check()
                try:
                    self._step_without_data()
                    met = None
                except (RanksDisagreeError, NonFiniteGradientError) as error:
                    met = error  # it ended the step on all ranks: do the others go on?
        except HorovodInternalError:
            raise
        except Exception as error:
            self._leave()
            if met is not None and error is not met:
                raise met from error
            raise

    def _step_without_data(self) -> None:
        """A step with gradients of zeros; the first time, with what was accumulated so far."""
        optimizer = self._optimizer
        self._hand_over()
        self._step()
        if self._session.in_step or optimizer._handles:
            raise DLSError(
                "the function that join() was given as step= must call optimizer.step(), or "
                "optimizer.synchronize()"
            )
        self.extra_steps += 1

    def _hand_over(self) -> None:
        """Begins the reductions of a step, of what there is."""
        optimizer = self._optimizer
        if not optimizer._handles:  # nothing accumulated
            for parameter in self._parameters:
                parameter.grad = None
        if self._asking:
            self._answer([None] * len(self._parameters))
        self._hear_answers()
        habits = _habits[optimizer] = self._habits_now()
        for parameter, sparse in zip(self._parameters, habits.sparse, strict=True):
            if sparse and parameter.grad is None:
                parameter.grad = no_rows(parameter)
        singly = {id(p) for p, alone in zip(self._parameters, habits.singly, strict=True) if alone}
        for key, begin in rest_of(optimizer, optimizer._handles, singly):
            optimizer._handles[key] = begin()
            self._owes = False
            if isinstance(key, tuple):  # as Horovod does it
                for parameter in key:
                    optimizer._handles.pop(parameter, None)
                optimizer._group_counts[key] = 0

    def _habits_now(self) -> Habits:
        """Of ranks with data, as of their last step."""
        told = [w.habits for w in self._hear() if w.intent is Intent.STEP and w.habits is not None]
        return Habits.of_all(told) if told else _habits[self._optimizer]

    # Leaving by an exception --------------------------------------------------------------------

    def _leave(self) -> None:
        """Tells the others that this rank takes part no more, and ends what they have begun."""
        self._compressor.abandon_step()
        self._hear()
        self._without_data = True
        if self._owes:
            self._give_up()
        if not self._who(Intent.LEAVE):  # else the others end theirs with that round
            self._tell(Intent.LEAVE)
            if self._who(Intent.STEP):
                self._give_up()

    def _give_up(self) -> None:
        """Takes part in a step that others have begun by telling them that it is given up."""
        optimizer = self._optimizer
        for parameter in self._parameters:
            parameter.grad = None
        habits = _habits.get(optimizer, Habits.none(len(self._parameters)))
        sparse = {id(p) for p, rows in zip(self._parameters, habits.sparse, strict=True) if rows}
        for key, begin in rest_of(optimizer, optimizer._handles):
            if id(key) not in sparse:
                optimizer._handles[key] = begin()
                break
        self._compressor.abandon_step()


def join(optimizer: Any, step: Callable[[], Any] | None = None) -> Joining:
    """For ``with``: ranks may have different numbers of batches.

    Inside, each rank trains with what it has.  At the end of the block, a rank takes part in the
    steps that others still make: its gradients are zeros, an average is over all ranks as ever, and
    its weights change as theirs do.  All ranks leave the block together.  What its residuals hold
    is sent in these steps.  All ranks of the optimizer's process set enter the block; each step
    inside is one of this optimizer.  With one process nothing happens.

    Args:
        optimizer: ``hvd.DistributedOptimizer(..., compression=DLSCompressor)``.
        step: what a rank without data calls to make a step; None: ``optimizer.step``.  Where more
            follows backward than that (clipping, a scaler, a scheduler that steps in the loop),
            the function that does it all, and that the loop calls, too.

    Returns:
        A context manager, which gives itself: ``last_rank`` and ``extra_steps``.

    Raises:
        DLSError: the optimizer has another compression, or the block another optimizer's steps.
        RanksDisagreeError: inside or at the end, on all ranks: one left by an exception, or their
            optimizers have different options (learning rates).

    Example:
        >>> with join(optimizer):
        ...     for images, labels in loader:
        ...         optimizer.zero_grad()
        ...         loss(model(images), labels).backward()
        ...         optimizer.step()
    """
    compressor = compressor_of(optimizer)
    if compressor is None or hasattr(optimizer, "_of_local_steps"):
        raise DLSError(
            f"join({type(optimizer).__name__}): it takes hvd.DistributedOptimizer(..., "
            "compression=DLSCompressor); with other compressions, call hvd.join() after the loop. "
            "With LocalSteps neither: a rank without data goes on calling rounds.step()"
        )
    return Joining(optimizer, compressor, step or optimizer.step)
