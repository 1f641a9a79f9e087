"""All ranks of a training, and the books: what came in, what came out, what waits in residuals."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from hvd_dls.core.balancing.layers import layer_spec
from hvd_dls.core.session.groups import Groups
from hvd_dls.core.session.session import Session
from hvd_dls.errors import NonFiniteGradientError
from tests.core.network import connect, outputs
from tests.core.ranks import Gradients, contribution, copies, frozen, make_sessions, same

SHAPES = {
    "conv1.weight": (6, 4, 3, 3),
    "conv1.bias": (6,),
    "conv2.weight": (10, 12),
    "embedding": (30, 8),
    "fc.weight": (5, 30),
    "fc.bias": (5,),
}
NAMES = list(SHAPES)


class Part(NamedTuple):
    """What a rank does in a step.

    Attributes:
        order: names of all layers of the step, as they come in.
        left_out: those of them that take no part on this rank.
        away: layers that need not be waited for.
        gradients: of all layers.
    """

    order: Sequence[str]
    left_out: Collection[str]
    away: Collection[str]
    gradients: Gradients


class Saved(NamedTuple):
    """A checkpoint, and the books of that time."""

    states: list[bytes]
    books: Gradients
    steps: int


class World:
    """Ranks of one model, with whole numbers as gradients, so that all sums are exact.

    Args:
        n_ranks: number of ranks; or how many there are in each group, of 1, 2 or 4.
        options: of the compressor.

    Attributes:
        books: of each layer: what came in on all ranks, and has not come out yet.
        steps: that have counted.
    """

    def __init__(self, n_ranks: int | Sequence[int], options: Mapping[str, Any]) -> None:
        self.options = {"dense_below": 0, "density": 0.1, "cost_rule": False} | dict(options)
        # Momentum of 1/2 makes numbers longer by a bit a step; averages of three fourths, by two.
        itemsize = 8 if "momentum" in options or options.get("hierarchical") else 4
        self.layers = [layer_spec(n, s, itemsize=itemsize) for n, s in SHAPES.items()]
        self.ranks = connect(self.new_sessions(n_ranks))
        self.books = {layer.name: np.zeros(layer.size) for layer in self.layers}
        self.steps = 0

    def new_sessions(self, n_ranks: int | Sequence[int]) -> list[Session]:
        groups = [1] * n_ranks if isinstance(n_ranks, int) else list(n_ranks)
        return make_sessions(sum(groups), self.layers, groups, **self.options)

    @property
    def groups(self) -> Groups:
        return self.sessions[0].groups

    @property
    def sessions(self) -> list[Session]:
        return [rank.session for rank in self.ranks]

    @property
    def scale(self) -> float:
        return self.sessions[0].loss_scale

    def draw(self, rng: np.random.Generator) -> Gradients:
        """Multiples of 1/16, up to 32, of a scale of their own a layer and step."""
        drawn = {}
        for layer in self.layers:
            values = np.clip(np.round(16 * rng.laplace(size=layer.size)), -64, 64)
            values *= 2.0 ** rng.integers(-4, 3)
            drawn[layer.name] = (self.scale * values).astype(layer.work_dtype)
        return drawn

    # Checks -------------------------------------------------------------------------------------

    def check(self) -> None:
        """Whatever has happened: nothing is lost, and ranks agree, to the bit."""
        agreed = self.sessions[0].agreed()
        for session in self.sessions:
            assert np.array_equal(session.agreed(), agreed)
            assert session.loss_scale == self.scale
            assert not session.in_step
        self.sessions[0].memory.controller.check(agreed)
        assert self.ranks[0].network.quiet
        for name, expected in self.books.items():
            assert np.array_equal(self.waiting(name), expected), name

    def waiting(self, name: str) -> np.ndarray:
        """What waits of a layer on all ranks, without the loss scale."""
        waiting = np.zeros(self.books[name].shape)
        for session in self.sessions:
            waiting += _held(session).get(name, 0.0) / self.scale
        return waiting

    def frozen(self) -> list[dict[str, object]]:
        return [frozen(session) for session in self.sessions]

    # A step -------------------------------------------------------------------------------------

    def gather(self, number: int, part: Part, count: int | None = None) -> None:
        """A rank's layers come in: the first ``count`` of them, or all."""
        rank = self.ranks[number]
        rank.begin(part.away)
        self.go_on(number, part, 0, count)

    def go_on(self, number: int, part: Part, start: int, stop: int | None = None) -> None:
        """More of them."""
        rank = self.ranks[number]
        for name in part.order[start:stop]:
            if name in part.left_out:
                rank.leave_out(name)
            else:
                rank.compress(name, part.gradients[name])

    def has_sent_all(self, number: int) -> bool:
        """Whether nothing is left for a rank to send but what did not come in the last step."""
        session = self.sessions[number]
        step, members = session._step, session.routing.members
        unsent = [n for n in range(len(members)) if n not in step.sent]
        return all(n not in step.begun and members[n] <= session.missed for n in unsent)

    def receive(self) -> None:
        """All payloads are sent, and taken."""
        for rank in self.ranks:
            rank.send_rest()
        for rank in self.ranks:
            rank.receive()

    def finish(self, number: int, order: Sequence[str]) -> Gradients:
        """A rank's sums of these layers."""
        rank = self.ranks[number]
        out = outputs(rank.session, order)
        for name in order:
            rank.finish(name, out[name], self.ranks)
        return out

    def step(self, parts: Sequence[Part], last: Sequence[Sequence[str]]) -> None:
        """A whole step, with all that must hold of it.

        Args:
            parts: what each rank does in its first half.
            last: the order of each rank's sums.
        """
        before = [(copies(s.residuals), _velocities(s)) for s in self.sessions]
        state, skipped = self.frozen(), [session.skipped for session in self.sessions]
        dense = self.sessions[0].dense_step
        bad = {
            (name, None if dense else self.sender_for(number, name))
            for number, part in enumerate(parts)
            for name in part.order
            if name not in part.left_out and not np.isfinite(part.gradients[name]).all()
        }
        for number, part in enumerate(parts):
            self.gather(number, part)
        assert self.frozen() == state
        self.receive()
        assert self.frozen() == state
        sums, errors = [], []
        for number in range(len(self.ranks)):
            try:
                sums.append(self.finish(number, last[number]))
            except NonFiniteGradientError as error:
                errors.append(error)
        if bad:
            assert self.frozen() == state
            if self.sessions[0].config.nonfinite == "raise":
                assert [error.where for error in errors] == [sorted(bad, key=str)] * len(self.ranks)
            else:
                assert [s.skipped for s in self.sessions] == [count + 1 for count in skipped]
                assert all(session.refused for session in self.sessions)
                for out in sums if not dense else ():
                    filled = np.inf if self.sessions[0].marks_skipped else 0
                    assert all((values == filled).all() for values in out.values())
            return
        assert not errors
        self._check_step(parts, before, sums, dense)
        self.steps += 1
        self._enter(parts, before, sums[0], dense)

    def _check_step(
        self,
        parts: Sequence[Part],
        before: Sequence[tuple[Any, Any]],
        sums: list[Gradients],
        dense: bool,
    ) -> None:
        """Of a step that counts: who took part, and nobody else, has changed; ranks agree."""
        assert all(same(out, sums[0]) for out in sums)
        there = parts[0].order
        nobody = {n for n in there if all(n in part.left_out for part in parts)}
        entered = {(number, name): came for number, name, came in self.entering(parts, dense)}
        for number, session in enumerate(self.sessions):
            residuals, velocities = before[number]
            momentum, masks = session.config.momentum, session.config.momentum_masking
            for name in NAMES:
                takes_part = (number, name) in entered
                if name in residuals and not takes_part:
                    assert np.array_equal(session.residuals[name], residuals[name])
                if name not in session.memory.correction.velocities:
                    continue
                velocity = session.memory.correction.velocities[name]
                if not takes_part:
                    assert np.array_equal(velocity, velocities[name])
                    continue
                moved = momentum * velocities[name] + entered[number, name]
                good = velocity == moved
                assert (good | (velocity == 0) if masks and name in residuals else good).all()
            assert session.last_step.step == self.sessions[0].last_step.step
            assert session.missed == set(NAMES) - set(parts[number].order)
        for name in nobody:
            assert not sums[0][name].any()
        told = {session.untouched for session in self.sessions}
        assert len(told) == 1
        assert told == {frozenset() if dense else frozenset(nobody)}

    def _enter(
        self,
        parts: Sequence[Part],
        before: Sequence[tuple[Any, Any]],
        sums: Gradients,
        dense: bool,
    ) -> None:
        """Enters a step into the books, as sums over those that send compressed layers."""
        for number, name, gradient in self.entering(parts, dense):
            came = contribution(self.sessions[number], before[number][1], name, gradient)
            self.books[name] += self.weight_of(name) * came.astype(float) / self.scale
        for name, values in sums.items():
            self.books[name] -= self.weight_of(name) * values.astype(float) / self.scale

    def weight_of(self, name: str) -> float:
        """What goes dense is divided by the number of ranks, not of groups, and weighs less."""
        return 1.0 if self.sessions[0].may_be_sparse(name) else self.groups.weight

    def sender_for(self, number: int, name: str) -> int:
        """The rank that tells the others of a rank's gradient."""
        routing = self.sessions[number].routing
        bucket = routing.bucket_of(name)
        if bucket is None:
            return number
        return routing.senders[bucket][self.sessions[number].groups.own]

    def entering(self, parts: Sequence[Part], dense: bool) -> Iterator[tuple[int, str, np.ndarray]]:
        """What enters velocities and residuals: a rank, a layer, its gradient or its group's."""
        of_group: dict[tuple[int, str], np.ndarray] = {}
        for number, part in enumerate(parts):
            for name in part.order:
                if name in part.left_out:
                    continue
                gradient = part.gradients[name]
                if dense or not self.sessions[number].may_be_sparse(name):
                    yield number, name, gradient
                    continue
                key = self.sender_for(number, name), name
                weighted = gradient * gradient.dtype.type(self.groups.weight)
                of_group[key] = of_group[key] + weighted if key in of_group else weighted
        for (number, name), gradient in of_group.items():
            yield number, name, gradient

    # Between steps ------------------------------------------------------------------------------

    def scale_to(self, scale: float) -> None:
        factor = scale / self.scale
        for session in self.sessions:
            before = _velocities(session)
            session.scale_to(scale)
            scaled = {name: values * factor for name, values in before.items()}
            assert same(_velocities(session), scaled)

    def save(self) -> Saved:
        states = [pickle.dumps(session.state_dict()) for session in self.sessions]
        return Saved(states, copies(self.books), self.steps)

    def load(self, saved: Saved) -> None:
        rounds = np.max([session.rounds for session in self.sessions], axis=0)
        for rank, state in zip(self.ranks, saved.states, strict=True):
            rank.load(pickle.loads(state), rounds)
        self.books, self.steps = copies(saved.books), saved.steps

    def restart(self, saved: Saved) -> None:
        """New processes go on from a checkpoint."""
        self.ranks = connect(self.new_sessions(self.groups.sizes))
        self.load(saved)
        self.agree()

    def agree(self) -> None:
        agreed = self.sessions[0].agreed()
        for session in self.sessions:
            session.agree(agreed)

    def resize(self, sizes: int | Sequence[int]) -> None:
        """Other ranks go on: the first of those that there were, and perhaps new ones."""
        new = self.new_sessions(sizes)
        n_ranks = len(new)
        old, factor = self.sessions, new[0].groups.count / self.groups.count
        if factor not in (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 0.25):
            factor = 1.0  # others would round
        scale, marks = self.scale, old[0].marks_skipped
        for name in self.books:
            survivors = [_held(session) for session in old[:n_ranks]]
            self.books[name] = sum(
                (factor * x[name].astype(float) / scale for x in survivors if name in x),
                np.zeros(self.books[name].shape),
            )
        kept = [copy.deepcopy(_velocities(session)) for session in old[:n_ranks]]
        for session, before in zip(new, old, strict=False):
            session.inherit(before, factor)
        for session in new[len(old) :]:
            session.scale_to(scale)
            session.marks_skipped = marks
        self.ranks = connect(new)
        self.agree()
        for session, velocities in zip(new, kept, strict=False):
            own = _velocities(session)
            assert same(own, {n: velocities.get(n, np.zeros_like(own[n])) for n in own})


def _held(session: Session) -> Gradients:
    """What waits on a rank: of its own, and of the sums that it owns.

    What goes dense is divided by the number of ranks, not of groups, and weighs as much less.
    """
    memory = session.memory
    held = copies(memory.residuals | memory.leftovers)
    for name in held.keys() - {layer.name for layer in session.plan.sparse}:
        held[name] *= held[name].dtype.type(session.groups.weight)
    for piece in memory.owners.pieces() if memory.owners else ():
        held[piece.layer.name][piece.places] += piece.sums
    return held


def _velocities(session: Session) -> Gradients:
    return copies(session.memory.correction.velocities)
