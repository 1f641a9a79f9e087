"""Whatever happens to a training, nothing is lost, and ranks agree to the bit.

Hypothesis makes up lives: steps, with layers in any order, frozen or missing; NaN; steps given up
by all ranks or by one, at any point; changes of the loss scale; saving, loading, restarts; other
numbers of ranks.  After each event the books are compared: what came in on all ranks is what came
out and what waits in residuals.
"""

import copy

import numpy as np
import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hvd_dls.core.balancing.attendance import PATIENCE
from hvd_dls.errors import RanksDisagreeError, StateMismatchError
from tests.core.world import NAMES, Part, World

OPTIONS = [
    {},
    {"bucket_bytes": 900, "pair_steps": 2},
    {"bucket_bytes": 900, "index_code": "plain", "adjust_every": 3, "min_k": 3},
    {"strategy": "layerwise", "layer_density": {"conv1.weight": 0.3, "conv2.weight": "dense"}},
    {"strategy": "global", "warmup_steps": 6},
    {"strategy": "norm", "bucket_bytes": 900},
    {"strategy": "hard", "threshold": 4.0},
    {"dense_steps": 2, "warmup_steps": 5},
    {"prior": "measured", "bucket_bytes": 900},
    {"values": "float16"},
    {"values": "bfloat16", "bucket_bytes": 900},
    {"momentum": 0.5, "bucket_bytes": 1800},
    {"momentum": 0.5, "nesterov": True, "momentum_masking": False, "dense_steps": 2},
    {"adam": (0, 0), "adam_eps": 1e-30, "bucket_bytes": 900},  # updates are signs, exactly
    {"adam": (0, 0), "adam_eps": 1e-30, "values": "float16", "dense_steps": 2},
    {"cost_rule": True, "warmup_steps": 4},
    {"cost_rule": True, "momentum": 0.5},
    {"density": 1.0},
]
MOST = 30  # steps of a life: more would need more bits

seeds = st.integers(0, 2**32 - 1)
few_layers = st.sets(st.sampled_from(NAMES), max_size=3)
points = st.lists(st.integers(0, len(NAMES)), min_size=4, max_size=4)


class Life(RuleBasedStateMachine):
    """Events in the life of a training."""

    @initialize(
        options=st.sampled_from(OPTIONS),
        n_ranks=st.sampled_from([2, 2, 3]),
        nonfinite=st.sampled_from(["raise", "skip"]),
        marks=st.booleans(),
    )
    def begin(self, options, n_ranks, nonfinite, marks):
        self.world = World(n_ranks, options | {"nonfinite": nonfinite})
        for session in self.world.sessions:
            session.marks_skipped = marks
        self.saved = self.world.save()
        self.frozen_now = [set() for _ in range(4)]

    @invariant()
    def nothing_is_lost_and_ranks_agree(self):
        if hasattr(self, "world"):
            self.world.check()

    def parts(self, rng, missing=()):
        """What each rank does in a step, without the layers that are missing on all of them."""
        there, parts = [name for name in NAMES if name not in missing], []
        for number in range(len(self.world.ranks)):
            left_out = self.frozen_now[number] & set(there)
            away = left_out if rng.random() < 0.5 else set()
            away = away | (set(missing) if rng.random() < 0.5 else set())
            order = rng.permutation(there).tolist()
            parts.append(Part(order, left_out, away, self.world.draw(rng)))
        return parts

    def orders(self, rng, parts):
        return [rng.permutation(part.order).tolist() for part in parts]

    # Steps --------------------------------------------------------------------------------------

    @precondition(lambda self: self.world.steps < MOST)
    @rule(seed=seeds, missing=few_layers, count=st.integers(1, 3))
    def step(self, seed, missing, count):
        rng = np.random.default_rng(seed)
        for _ in range(count):
            parts = self.parts(rng, missing if rng.random() < 0.5 else ())
            self.world.step(parts, self.orders(rng, parts))

    @precondition(lambda self: self.world.steps < MOST)
    @rule(seed=seeds, names=st.sets(st.sampled_from(NAMES), min_size=1, max_size=2))
    def step_with_nan(self, seed, names):
        rng = np.random.default_rng(seed)
        parts = self.parts(rng)
        for name in names:
            gradient = parts[rng.integers(len(parts))].gradients[name]
            gradient[rng.integers(len(gradient))] = rng.choice([np.nan, np.inf, -np.inf])
        self.world.step(parts, self.orders(rng, parts))

    @precondition(lambda self: self.world.steps < MOST - PATIENCE - 2)
    @rule(seed=seeds, name=st.sampled_from(NAMES))
    def a_layer_stays_away(self, seed, name):
        rng = np.random.default_rng(seed)
        for _ in range(PATIENCE + 1):
            parts = self.parts(rng, {name})
            self.world.step(parts, self.orders(rng, parts))

    @rule(frozen=st.lists(few_layers, min_size=4, max_size=4), alike=st.booleans())
    def freeze(self, frozen, alike):
        self.frozen_now = [frozen[0]] * 4 if alike else frozen

    @rule()
    def thaw(self):
        self.frozen_now = [set() for _ in range(4)]

    # Steps that are given up --------------------------------------------------------------------

    @rule(seed=seeds, at=points, received=st.booleans())
    def all_give_up(self, seed, at, received):
        """Each at a point of its own, or all when the payloads of all are there."""
        world, rng = self.world, np.random.default_rng(seed)
        before, parts = world.frozen(), self.parts(np.random.default_rng(seed))
        for number, part in enumerate(parts):
            stop = max(at[number], 1)
            world.gather(number, part, stop)
            if received or world.has_sent_all(number):
                world.go_on(number, part, stop)
        if received:
            world.receive()
        assert world.frozen() == before
        for number in rng.permutation(len(parts)):
            world.ranks[number].abandon()
        assert world.frozen() == before

    @precondition(lambda self: not self.world.sessions[0].dense_step)
    @rule(seed=seeds, at=points)
    def one_gives_up(self, seed, at):
        """The others hear of it, wherever they are."""
        world, rng = self.world, np.random.default_rng(seed)
        before, parts = world.frozen(), self.parts(np.random.default_rng(seed))
        leaver = int(rng.integers(len(parts)))
        for number, part in enumerate(parts):
            stop = at[number]
            world.gather(number, part, max(stop, 1) if number == leaver else stop)
            if number == leaver and world.has_sent_all(number):
                world.go_on(number, part, stop)
        farewell = world.ranks[leaver].abandon()
        if all(each is None for last in farewell.values() for each in last[:3]):
            mates = world.sessions[leaver].groups.mates if farewell else []
            self.out_of_step(parts, at, leaver, mates)
            return
        for number, part in enumerate(parts):
            if number != leaver:
                world.go_on(number, part, at[number])
                world.ranks[number].send_rest()
        for number, rank in enumerate(world.ranks):
            if number != leaver:
                with pytest.raises(RanksDisagreeError, match=self.given_up_by(leaver)):
                    rank.receive()
                rank.abandon()
        assert world.frozen() == before

    def given_up_by(self, leaver):
        return rf"\[{leaver}\] gave step"

    def out_of_step(self, parts, at, leaver, mates):
        """All had been sent, so the others make the step; that is told, and a checkpoint helps.

        The leaver's mates do not, if they wait for what it was to hand on.
        """
        world = self.world
        others = [number for number in range(len(parts)) if number != leaver]
        for number in others:
            world.go_on(number, parts[number], at[number])
            world.ranks[number].send_rest()
        for number in others:
            if number in mates:
                with pytest.raises(RanksDisagreeError, match=self.given_up_by(leaver)):
                    world.ranks[number].receive()
                world.ranks[number].abandon()
                continue
            world.ranks[number].receive()
            for name in parts[number].order:
                if name in world.ranks[number].whole:
                    world.sessions[number].accept(name)
                else:
                    world.sessions[number].decompress(name, np.empty_like(world.books[name]))
        for number, part in enumerate(self.parts(np.random.default_rng(0))):
            world.gather(number, part)
        for rank in world.ranks:
            rank.send_rest()
        for rank in world.ranks:
            with pytest.raises(RanksDisagreeError, match="a step that ended on one was given up"):
                rank.receive()
            rank.abandon()
        self.restart_from_checkpoint()

    @precondition(lambda self: self.world.steps < MOST)
    @rule(seed=seeds, at=points)
    def give_up_while_sums_are_written(self, seed, at):
        """Behind any number of layers; a step that is not dense is brought to its end then."""
        world, rng = self.world, np.random.default_rng(seed)
        parts = self.parts(rng)
        orders, before = self.orders(rng, parts), world.frozen()
        dense = world.sessions[0].dense_step
        made = copy.deepcopy(world)
        made.step(copy.deepcopy(parts), orders)
        for number, part in enumerate(parts):
            world.gather(number, part)
        world.receive()
        for number, order in enumerate(orders):
            count = min(max(at[number], 1), len(order) - 1)
            out = world.finish(number, order[:count])
            assert dense or all(
                values.any() or np.isfinite(values).all() for values in out.values()
            )
            world.ranks[number].abandon()
        if dense:
            assert world.frozen() == before
        else:
            assert world.frozen() == made.frozen()
            world.books, world.steps = made.books, made.steps

    # Between steps ------------------------------------------------------------------------------

    @rule(exponent=st.integers(-6, 10))
    def another_loss_scale(self, exponent):
        self.world.scale_to(2.0**exponent)

    @rule()
    def save(self):
        self.saved = self.world.save()

    @precondition(lambda self: len(self.saved.states) == len(self.world.ranks))
    @rule(seed=seeds, at=points, gone=st.sets(st.integers(0, 3)))
    def load_checkpoint(self, seed, at, gone):
        """Each rank is between steps, or at a point of its own in one, or gave one up by itself."""
        world = self.world
        for number, part in enumerate(self.parts(np.random.default_rng(seed))):
            if at[number]:
                world.gather(number, part, at[number])
            if number in gone:
                world.ranks[number].abandon()
        before, states = world.frozen(), [s.state_dict() for s in world.sessions]
        if len(states) > 1:
            with pytest.raises(StateMismatchError, match="saved by rank 1, but this is rank 0"):
                world.sessions[0].load_state_dict(states[1])
            assert world.frozen() == before
        world.load(self.saved)

    @rule()
    def restart_from_checkpoint(self):
        self.world.restart(self.saved)

    @rule()
    def restart_from_now(self):
        before = self.world.frozen()
        self.world.restart(self.world.save())
        assert self.world.frozen() == before

    @rule(n_ranks=st.sampled_from([1, 2, 2, 3, 4]), then=st.sampled_from(["", "scale", "restart"]))
    def other_ranks(self, n_ranks, then):
        """As after hvd.init(): the same number, or another one."""
        self.world.resize(n_ranks)
        self.saved = self.world.save()
        if then == "scale":
            self.world.scale_to(2 * self.world.scale)
        elif then == "restart":
            self.restart_from_now()


OPTIONS_OF_HOSTS = [
    {},
    {"pair_steps": 2, "warmup_steps": 4},
    {"bucket_bytes": 900, "index_code": "plain", "adjust_every": 3, "min_k": 3},
    {"strategy": "layerwise", "layer_density": {"conv1.weight": 0.3, "conv2.weight": "dense"}},
    {"dense_steps": 2, "warmup_steps": 5},
    {"values": "bfloat16"},
    {"momentum": 0.5, "bucket_bytes": 900},
    {"momentum": 0.5, "nesterov": True, "momentum_masking": False},
    {"adam": (0, 0), "adam_eps": 1e-30},
    {"density": 1.0},
]
HOSTS = [(2, 2), (2, 2), (1, 3), (2, 1, 1), (1, 1, 1), (4,)]


class LifeOnHosts(Life):
    """The same of ranks that average their gradients with those of their host."""

    @initialize(
        options=st.sampled_from(OPTIONS_OF_HOSTS),
        sizes=st.sampled_from(HOSTS),
        nonfinite=st.sampled_from(["raise", "skip"]),
        marks=st.booleans(),
    )
    def begin(self, options, sizes, nonfinite, marks):
        super().begin(options | {"hierarchical": True}, sizes, nonfinite, marks)

    def given_up_by(self, leaver):
        """Ranks of its host are told that it did, others that the one that sends for it did."""
        return (
            r" gave step \d+ up, .* there(,| or) on a rank it sends for"
            if self.grouped
            else (super().given_up_by(leaver))
        )

    @property
    def grouped(self):
        return self.world.sessions[0].grouped

    @precondition(lambda self: not self.world.options.keys() & {"momentum", "adam"})
    @rule(sizes=st.sampled_from(HOSTS), then=st.sampled_from(["", "scale", "restart"]))
    def other_ranks(self, sizes, then):
        """On other hosts: with momentum, what waits would gather it again; with Adam, refused."""
        super().other_ranks(sizes, then)


OPTIONS_OF_OWNERS = [
    {},
    {"bucket_bytes": 900, "values": "float16", "min_k": 3},
    {"momentum": 0.5, "warmup_steps": 6, "index_code": "plain"},
    {"adam": (0, 0), "adam_eps": 1e-30},
    {"density": 1.0, "bucket_bytes": 900},
    {"prior": "measured", "layer_density": {"conv1.weight": 0.3, "conv2.weight": "dense"}},
]


class LifeWithOwners(Life):
    """The same where owners add up what ranks send."""

    @initialize(
        options=st.sampled_from(OPTIONS_OF_OWNERS),
        n_ranks=st.sampled_from([2, 2, 3]),
        nonfinite=st.sampled_from(["raise", "skip"]),
        marks=st.booleans(),
    )
    def begin(self, options, n_ranks, nonfinite, marks):
        super().begin(options | {"exchange": "sparse_allreduce"}, n_ranks, nonfinite, marks)


OPTIONS_OF_OWNERS_ON_HOSTS = [
    {},
    {"bucket_bytes": 900, "values": "bfloat16", "min_k": 3},
    {"momentum": 0.5, "index_code": "plain"},
    {"density": 1.0, "bucket_bytes": 900},
    {"dense_steps": 2, "warmup_steps": 5},
]


class LifeWithOwnersOnHosts(LifeOnHosts):
    """The same where ranks average with those of their host, and owners add up between hosts."""

    @initialize(
        options=st.sampled_from(OPTIONS_OF_OWNERS_ON_HOSTS),
        sizes=st.sampled_from(HOSTS),
        nonfinite=st.sampled_from(["raise", "skip"]),
        marks=st.booleans(),
    )
    def begin(self, options, sizes, nonfinite, marks):
        super().begin(options | {"exchange": "sparse_allreduce"}, sizes, nonfinite, marks)


# To shorten an example that fails takes longer than a test may; HYPOTHESIS_PROFILE=explore does it.
exploring = settings.default.max_examples > 100
lives = settings(
    max_examples=1000 if exploring else 20,
    stateful_step_count=25,
    phases=[*Phase] if exploring else [Phase.generate],
)
TestLife, TestLifeOnHosts = Life.TestCase, LifeOnHosts.TestCase
TestLifeWithOwners = LifeWithOwners.TestCase
TestLifeWithOwnersOnHosts = LifeWithOwnersOnHosts.TestCase
TestLife.settings = TestLifeOnHosts.settings = lives
TestLifeWithOwners.settings = TestLifeWithOwnersOnHosts.settings = lives
