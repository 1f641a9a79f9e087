"""One model's layers and the session that compresses them, agreed on by all ranks."""

from __future__ import annotations

import functools
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

import numpy as np

import hvd_dls
from hvd_dls.adapter.exchanges import exchange_of
from hvd_dls.adapter.hosts import HostSets, groups_of, host_sets, known_sets, row_of
from hvd_dls.adapter.leaving import meet_at_exit
from hvd_dls.adapter.states import LoadedStates, take_state_of
from hvd_dls.adapter.world import World, epoch
from hvd_dls.config import DLSConfig
from hvd_dls.core import disk_cache
from hvd_dls.core.balancing.layers import LayerSpec
from hvd_dls.core.selection import threads
from hvd_dls.core.selection.backend import Backend
from hvd_dls.core.session import moments
from hvd_dls.core.session.base import SessionBase
from hvd_dls.core.session.groups import Groups
from hvd_dls.core.session.session import Session
from hvd_dls.core.wire import agreement
from hvd_dls.core.wire.agreement import Claim
from hvd_dls.errors import DLSError

# Names of the operations in which ranks compare notes.  They depend on nothing that may differ
# between ranks; where a rank is missing, Horovod's stall report shows them.
_HOSTS, _AGREE, _LOAD = "hvd_dls.hosts", "hvd_dls.agree", "hvd_dls.load_state_dict"
_LEAVE, _MOMENTS = "hvd_dls.leave", "hvd_dls.moments"
_labels: set[str] = set()  # of operations, of all models so far


class BaseBinding(ABC):
    """One model's layers and the session that compresses them.

    A session begins with the first gradient, when all ranks have come that far: they compare
    options and layers, and take over the first rank's ratios.  After ``hvd.init()`` was called
    again they do so once more, and what waits in residuals is kept.

    Args:
        layers: in model order, with distinct names.
        config: the options.

    Attributes:
        session: None before the first gradient.
        loss_scale: tells what the loss is multiplied by, if it is.
        host_sets: where the ranks of each host average their gradients first.
        states: saved ones that wait for models; the session takes its own out of them.
        observers: of the session's steps.
    """

    def __init__(self, layers: Sequence[LayerSpec], config: DLSConfig) -> None:
        self.session: Session | None = None
        self.loss_scale: Callable[[], float] | None = None
        self._layers = list(layers)
        self._config = config
        self.states = LoadedStates()
        self.observers: list[Callable[[SessionBase], None]] = []
        self._world: World | None = None
        self._epoch: Any = None
        self._label = ""
        self.host_sets: HostSets | None = None

    @property
    @abstractmethod
    def alive(self) -> bool:
        """Whether the model still exists."""

    @abstractmethod
    def _gather(self, name: str, array: np.ndarray) -> np.ndarray:
        """All ranks' arrays, of any lengths, one after the other in rank order."""

    @abstractmethod
    def _norms(self) -> dict[str, float]:
        """Frobenius norm of each layer's weights, by name."""

    def _backends(self, config: DLSConfig) -> Mapping[str, Backend]:
        """Where arrays of layers are that are not on the host, by name.

        Args:
            config: with the exchange in use.
        """
        return {}

    # Agreement ----------------------------------------------------------------------------------

    @property
    def agreed(self) -> bool:
        """Whether there is a session that all ranks of today agree on."""
        return self.session is not None and self._epoch is epoch()

    def agree(self, world: World) -> Session:
        """Makes the session, together with all other ranks.

        Args:
            world: the ranks.

        Raises:
            RanksDisagreeError: the ranks have different options, layers or versions.
            DLSError: the density is too low for the model, for example; then the other ranks raise
                it, too, or a RanksDisagreeError that names this one and tells what it met.
            StateMismatchError: a state that was loaded before does not fit.
        """
        old, error, session, loaded = self.session, None, None, None
        before, of_former = old, None
        groups, hosts = Groups.of_one(world.size, world.rank), list[list[int]]()
        sets: dict[tuple[int, ...], int] = {}
        # All ranks gather this, whatever their options are: these are compared afterwards.
        rows = row_of(world)
        if world.size > 1:
            rows = self._gather(_HOSTS, rows)
        try:
            if self._config.hierarchical:
                groups, hosts = groups_of(rows, world)
                sets = known_sets()
            if old is None and self.states.of_former_ranks:
                of_former = take_state_of(self.parameters_of_state, self.states)
                before = self._session_of_former(of_former, world)
            session = self._new_session(world, groups, before)
            if before is None:
                loaded = take_state_of(self.parameters_of_state, self.states)
            if loaded is not None:
                session.load_state_dict(loaded)
        except Exception as met:
            error = met
        facts = agreement.facts_of(hvd_dls.__version__, self._config, self._layers)
        facts.insert(1, ("sources of hvd_dls", _sources()))
        facts.append(("ranks on each host", [len(ranks) for ranks in hosts]))
        facts.append(("exchange in use", session.config.exchange if session else ""))
        facts.append(("saved state", _summary_of(loaded) if loaded else "none"))
        first = world.rank == 0
        own = Claim(
            checksum=agreement.checksum(facts),
            error=f"{type(error).__name__}: {error}" if error else "",
            label=(self._label or _new_label(world)) if first else "",
            numbers=self._numbers(session, first) if session else None,
        )
        try:
            claims = [own] if world.size == 1 else self._compare(_AGREE, own, facts, world)
        except BaseException:
            if (taken := loaded or of_former) is not None:
                self.states.insert(0, taken)  # for the next attempt
            raise
        if error is not None:
            raise error
        agreement.check_errors(claims)
        assert session is not None
        exchanges_by_hosts = session.grouped and session.routing.buckets
        self.host_sets = host_sets(groups, hosts, world, sets) if exchanges_by_hosts else None
        if exchanges_by_hosts:
            meet_at_exit(session, world.set_id, self._meet)
        session.agree(np.array(claims[0].numbers, np.int64))
        self._hand_moments_on(session, [claim.numbers for claim in claims])
        self._label = claims[0].label
        session.observers = self.observers
        _labels.add(self._label)  # this rank may be the first one some day
        self._world, self._epoch, self.session = world, epoch(), session
        if old is None:
            session.announce()
        return session

    def _numbers(self, session: Session, first: bool) -> list[int] | None:
        numbers: list[int] = session.agreed().tolist()
        if first:
            return numbers
        return numbers[:1] if self._config.adam else None

    def _hand_moments_on(self, session: Session, numbers: list[Any]) -> None:
        """Ranks that have come later begin with the moments of one that has trained.

        With moments of zero, their first updates would be as large as at the start of a training.

        Args:
            session: that all have agreed on.
            numbers: of all claims; the first of each is how many steps the rank has made.
        """
        trained = [bool(own and own[0]) for own in numbers]
        if not self._config.adam or session.grouped or all(trained) or not any(trained):
            return
        rank = session.groups.rank
        giving = rank == trained.index(True)
        own = moments.pack(session.memory) if giving else np.empty(0, np.uint8)
        message = self._gather(_MOMENTS, own)
        if not trained[rank]:
            moments.unpack(message, session.memory)

    def _meet(self) -> None:
        """Returns when all ranks have called it."""
        self._gather(_LEAVE, np.zeros(1, np.uint8))

    def _with_exchange(self, senders: int) -> DLSConfig:
        """The options, with the exchange that is meant by "auto"."""
        exchange = exchange_of(self._config, senders, self._wants_device)
        return replace(self._config, exchange=exchange)

    @property
    def _wants_device(self) -> bool:
        """Whether the passes of some layer are made on a device, if they can be."""
        return False

    def _session_of_former(self, state: Mapping[str, Any] | None, world: World) -> Session | None:
        """The session that goes on from a state that was loaded among other ranks than today's.

        Elastic training: what waits weighs as much as before, as if this rank had begun then.
        """
        if state is None:
            return None
        rank, size = self.states.rank, self.states.size
        then = world._replace(rank=rank, size=size)
        session = self._new_session(then, Groups.of_one(size, rank), None)
        session.load_state_dict(state)
        return session

    def _new_session(self, world: World, groups: Groups, old: Session | None) -> Session:
        """A session of these ranks, which goes on from one of others."""
        if self._config.adam and not world.averages:
            raise DLSError(
                f"adam={self._config.adam} with op=hvd.Sum: each rank makes an update of its own, "
                "and their sum would be a step too large by the number of ranks (Adam behind the "
                "exchange divides that out); use op=hvd.Average"
            )
        config = self._with_exchange(groups.count)
        threads.use(self._config.threads or threads.to_spare(world.local_size))
        norms = self._norms() if self._config.prior == "weight_norm" else None
        session = Session(
            self._layers,
            config,
            world.size,
            world.rank,
            norms,
            self._backends(config),
            groups,
            self._planned_for,
        )
        session.memory.averages = world.averages
        if old is not None:
            # What waits in a residual reaches the weights divided by the number of senders; sums
            # over ranks, multiplied by that of ranks.
            before = old.groups
            factor = groups.count / before.count
            if not world.averages:
                factor *= before.world_size / groups.world_size
            session.inherit(old, factor)
        return session

    @property
    def _planned_for(self) -> int | None:
        """Number of ranks by which layers are chosen for compression; None: that of today."""
        return None

    def _compare(self, name: str, own: Claim, facts: agreement.Facts, world: World) -> list[Claim]:
        """All ranks' claims; raises on all of them if their facts differ."""
        gathered = self._gather(name, agreement.encode(own))
        claims = [Claim(*claim) for claim in agreement.decode(gathered, world.size)]
        if len({claim.checksum for claim in claims}) > 1 and not any(c.error for c in claims):
            details = self._gather(f"{name}.details", agreement.encode(facts))
            agreement.check_facts(agreement.decode(details, world.size))
        return claims

    def abandon(self) -> None:
        """Gives the step in progress up: see ``Session.abandon``."""
        if self.session is not None:
            self.session.abandon()

    def go_back(self, session: Session | None) -> None:
        """Goes on from an earlier session; the ranks agree anew at the next gradient.

        This rank alone does it, whatever has become of Horovod: a step in progress is forgotten,
        and no other rank hears of it.

        Args:
            session: what was remembered then, perhaps among another number of ranks; None: nothing.
        """
        self.session, self._epoch, self._label = session, None, ""

    # Steps --------------------------------------------------------------------------------------

    def _follow_loss_scale(self, session: Session) -> None:
        """To be called before a step's first gradient comes in."""
        if self.loss_scale is not None and not session.in_step:
            session.marks_skipped = True
            session.scale_to(float(self.loss_scale()))

    def _catch_up(self, session: Session, rounds: np.ndarray) -> None:
        """Takes part in what other ranks have begun and given up, and this one has not begun.

        Here this is only counted: it is all there is to do where no operation outlives the call
        that begins it.

        Args:
            session: of the model.
            rounds: see ``Session.sit_out``.
        """
        session.sit_out(rounds)

    # State --------------------------------------------------------------------------------------

    @property
    def parameters_of_state(self) -> list[list[Any]]:
        """What a saved state is recognised by: names and shapes of all layers."""
        return [[layer.stable_name, list(layer.shape)] for layer in self._layers]

    def state_dict(self) -> dict[str, Any]:
        """The session's state; empty before there is one."""
        return {} if self.session is None else self.session.state_dict()

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raises StateMismatchError if the state does not fit, as far as is known yet."""
        if self.session is not None:
            self.session.check_state(state)

    def vote_on_state(
        self, state: Mapping[str, Any] | None, error: Exception | None
    ) -> np.ndarray | None:
        """Compares with all other ranks what each is about to load, if they have agreed before.

        Args:
            state: for this model; None if there is none.
            error: why this rank cannot load, or None.

        Returns:
            For ``load_state_dict``: how often the ranks have taken part, the largest of all (see
            ``Session.rounds``); None if there was nobody to ask, or nothing will be loaded.

        Raises:
            StateMismatchError: the states are of different steps, or another rank cannot load its
                own; on every rank alike.
        """
        world, session = self._world, self.session
        if not self.agreed or session is None or world is None or world.size == 1:
            return None
        facts: agreement.Facts = [("saved state", _summary_of(state) if state else "none")]
        own = Claim(
            agreement.checksum(facts),
            f"{error}" if error else "",
            numbers=session.rounds.tolist(),
        )
        claims = self._compare(_LOAD, own, facts, world)
        if error is not None:
            return None
        agreement.check_errors(claims)
        rounds: np.ndarray = np.array([c.numbers or [] for c in claims], np.int64).max(axis=0)
        return rounds

    def load_state_dict(self, state: Mapping[str, Any], rounds: np.ndarray | None = None) -> None:
        """Goes on from a state that fits; a step in progress is given up.

        Args:
            state: for this model.
            rounds: what ``vote_on_state`` returned.
        """
        self.abandon()
        if self.session is None:
            return
        if rounds is not None:
            self._catch_up(self.session, rounds)
        self.session.load_state_dict(state)


def _new_label(world: World) -> str:
    labels = (f"dls.{world.set_id}.{number}" for number in count(1))
    return next(label for label in labels if label not in _labels)


@functools.cache
def _sources() -> str:
    """Digest of the package's sources; empty where there are none beside the compiled files."""
    try:
        return disk_cache.digest(disk_cache.PACKAGE)
    except FileNotFoundError:
        return ""


def _summary_of(state: Mapping[str, Any]) -> str:
    """What ranks must have in common of their states: the step, and a checksum of the ratios."""
    ratios = np.asarray(state.get("ratios", ()), np.int64)
    return f"step {state.get('step')}, ratios {zlib.crc32(ratios.tobytes()):08x}"
