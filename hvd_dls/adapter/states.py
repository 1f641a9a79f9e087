"""Which saved state belongs to which model: by their layers, not by the order of training.

And to which ranks: those of the time when it was loaded, who may have changed before a model takes
it, in an elastic job.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hvd_dls.adapter.world import Ranks, epoch, is_elastic, own_rank
from hvd_dls.errors import StateMismatchError

STATE_VERSION = 1  # of the compressor's state; each model's has a version of its own


class LoadedStates(list[Mapping[str, Any]]):
    """States of models to come, and the ranks among which they were loaded.

    Attributes:
        rank: this process's number then; -1 before Horovod is initialised.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rank, self._ranks = -1, Ranks()

    def load(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Takes other states in, of the ranks of now."""
        self[:] = states
        self.rank = -1
        self.date()

    def date(self) -> None:
        """Notes who the ranks are, unless that was done, or there are none before ``hvd.init``."""
        rank = own_rank()
        if self.rank < 0 and rank is not None:
            self.rank, self._ranks = rank, epoch()

    @property
    def size(self) -> int:
        """Number of ranks then."""
        return len(self._ranks)

    @property
    def of_former_ranks(self) -> bool:
        """Whether workers have come or gone since: the states are of this rank as it was then."""
        return bool(self) and self.rank >= 0 and is_elastic() and self._ranks is not epoch()


def models_in(state: Any) -> list[Mapping[str, Any]]:
    """The states of all models in a compressor's state.

    Raises:
        StateMismatchError: it is something else.
    """
    if not isinstance(state, Mapping) or state.get("version") != STATE_VERSION:
        version = state.get("version") if isinstance(state, Mapping) else type(state).__name__
        raise StateMismatchError(f"saved state has version {version}, expected {STATE_VERSION}")
    if "models" not in state:
        raise StateMismatchError("the saved state lacks models")
    return [model for model in state["models"] if model]


def take_state_of(
    parameters: Sequence[Sequence[Any]], waiting: list[Mapping[str, Any]]
) -> Mapping[str, Any] | None:
    """Takes the first state that is of a model with these parameters out of a list.

    Args:
        parameters: [stable name, shape] of each layer of the model.
        waiting: saved states; one is removed.

    Returns:
        The state; None if there are none at all.

    Raises:
        StateMismatchError: there are some, but none of such a model.
    """
    wanted = [[name, list(shape)] for name, shape in parameters]
    for position, state in enumerate(waiting):
        if _fits(wanted, state):
            return waiting.pop(position)
    if not waiting:
        return None
    raise StateMismatchError(_difference(wanted, waiting[0]))


def _fits(wanted: list[list[Any]], state: Mapping[str, Any]) -> bool:
    saved = state.get("parameters")
    if saved is None:  # version 2 told the compressed layers only
        known = dict(wanted)
        layers = state.get("layers") or []
        return all(known.get(name) == list(shape)[:-1] for name, shape in layers)
    return [[name, list(shape)] for name, shape in saved] == wanted


def _difference(wanted: list[list[Any]], state: Mapping[str, Any]) -> str:
    saved = state.get("parameters") or [[n, list(s)[:-1]] for n, s in state.get("layers", [])]
    known = {name: list(shape) for name, shape in saved}
    for name, shape in wanted:
        if name not in known:
            return f"layer {name!r} of shape {shape} is not in any saved state"
        if known[name] != shape:
            return f"layer {name!r} was saved in shape {known[name]}, it has {shape} now"
    there = [name for name, _ in wanted]
    unknown = [name for name in known if name not in there]
    if unknown:
        return f"saved with a layer {unknown[0]!r}, not there now"
    return "the saved layers stand in another order"
