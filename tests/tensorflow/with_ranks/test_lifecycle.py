"""Ranks that differ are told, steps can fail at any point, and saved states are checked.

Many of these would hang if they failed: the job that runs them has a time limit.
"""

import functools
import logging
import pickle
import time

import horovod.tensorflow as hvd
import keras
import numpy as np
import pytest
import tensorflow as tf

from hvd_dls import DLSError, StateMismatchError
from hvd_dls.tensorflow import DLSCompressor
from tests.tensorflow.with_ranks.training import (
    SPARSE,
    Net,
    Trainer,
    assert_same_on_all_ranks,
    batch,
    cross_entropy,
    flat,
    reduced,
    whole_numbers,
)

SHAPES = [(30, 40), (3, 3, 4, 8), (20, 11)]

# Of what the way in which a step runs makes no difference to: tracing takes its time.
eagerly = pytest.mark.parametrize("mode", ["eager"])


@pytest.fixture(autouse=True)
def all_ranks_get_here():
    yield
    hvd.allreduce(tf.zeros(1), name="test.ended")


class Ledger:
    """Steps whose gradients are whole numbers, and what became of them.

    A step can be made to fail on all ranks: before there is any gradient ("forward"), when all
    gradients but one are there ("backward"), or when Horovod has returned all of them ("behind").
    """

    def __init__(self, mode, **options):
        self.variables = [tf.Variable(tf.zeros(shape), name="w") for shape in SHAPES]
        self.out = [tf.Variable(tf.zeros(shape)) for shape in SHAPES]
        self.compression = DLSCompressor(density=0.1, **SPARSE, **options)
        self._fails = None
        self._received = [np.zeros(shape) for shape in SHAPES]
        self._accumulated = [np.zeros(shape) for shape in SHAPES]
        self._run = tf.function(self._gradients) if mode == "tf.function" else self._gradients

    def _fail_if(self, where):
        """A function that hands an array on."""

        def maybe(array):
            if self._fails == where:
                if where == "backward":
                    time.sleep(1)  # the other gradients are on their way by then
                raise RuntimeError("broken on purpose")
            return array

        return maybe

    def _gradients(self, *wanted):
        @tf.custom_gradient
        def breakable(x):
            def gradient(upstream):
                out = tf.numpy_function(self._fail_if("backward"), [upstream], tf.float32)
                return tf.ensure_shape(out, x.shape)

            return tf.identity(x), gradient

        one = tf.numpy_function(self._fail_if("forward"), [tf.constant(1.0)], tf.float32)
        wanted = [g * tf.ensure_shape(one, []) for g in wanted]
        first, *others = self.variables
        with tf.GradientTape() as tape:
            losses = [tf.reduce_sum(breakable(first) * wanted[0])]
            losses += [tf.reduce_sum(v * g) for v, g in zip(others, wanted[1:], strict=True)]
            loss = tf.add_n(losses)
        tape = hvd.DistributedGradientTape(tape, compression=self.compression, op=hvd.Sum)
        gradients = tape.gradient(loss, self.variables)
        saved = [out.assign(g) for out, g in zip(self.out, gradients, strict=True)]
        with tf.control_dependencies(saved):
            return tf.numpy_function(self._fail_if("behind"), [one + 0], tf.float32)

    def step(self, step, fails=None):
        """Makes a step; one that fails before its end leaves nothing behind."""
        self._fails = fails
        wanted = [whole_numbers(shape, step) for shape in SHAPES]
        if fails is None:
            self._run(*map(tf.constant, wanted))
        else:
            with pytest.raises((RuntimeError, tf.errors.OpError), match="broken on purpose"):
                self._run(*map(tf.constant, wanted))
        if fails in (None, "behind"):
            for i, shape in enumerate(SHAPES):
                self._received[i] += self.out[i].numpy()
                for rank in range(hvd.size()):
                    self._accumulated[i] += whole_numbers(shape, step, rank)

    @property
    def residuals(self):
        """Copies, by name."""
        (state,) = self.compression.state_dict()["models"]
        return {name: np.array(residual) for name, residual in state["residuals"].items()}

    def assert_nothing_is_lost(self):
        for i, residual in enumerate(self.residuals.values()):
            kept = hvd.allreduce(tf.constant(residual), op=hvd.Sum, name=f"kept.{i}").numpy()
            total = self._received[i] + kept.reshape(SHAPES[i])
            np.testing.assert_array_equal(total, self._accumulated[i])


# Agreement ----------------------------------------------------------------------------------------


def test_a_layer_of_another_width_is_named_on_every_rank(mode):
    width = 40 + min(hvd.rank(), 1)
    variables = [tf.Variable(tf.zeros([9, 30]), name="a"), tf.Variable(tf.zeros([30, width]))]
    gradients = [np.ones(v.shape, np.float32) for v in variables]
    with pytest.raises(Exception, match=r"rank 1 has layer 1: .*\(30, 41\).*rank 0: .*\(30, 40\)"):
        reduced(variables, gradients, DLSCompressor(density=0.1, **SPARSE), mode)
    Trainer(Net(), DLSCompressor(density=0.1, **SPARSE), mode).train(range(2))  # others go on


@eagerly
def test_a_layer_more_is_named_on_every_rank(mode):
    variables = [tf.Variable(tf.zeros([30, 40]), name=name) for name in "abc"[: 2 + hvd.rank() % 2]]
    gradients = [np.ones(v.shape, np.float32) for v in variables]
    with pytest.raises(Exception, match=r"rank 1 has number of layers: 3, rank 0: 2"):
        reduced(variables, gradients, DLSCompressor(density=0.1, **SPARSE), mode)


def test_options_that_differ_are_named_but_for_a_ranks_own(mode):
    other = DLSCompressor(density=0.1, values=["float32", "float16"][hvd.rank() % 2], **SPARSE)
    with pytest.raises(Exception, match="rank 1 has option values: 'float16', rank 0: 'float32'"):
        Trainer(Net(), other, mode).train(range(1))
    own = DLSCompressor(density=0.1, threads=1 + hvd.rank(), measure_every=hvd.rank(), **SPARSE)
    Trainer(Net(), own, mode).train(range(2))
    assert own.last_step().step == 2


def test_a_compressor_that_only_one_rank_makes_does_not_matter(mode):
    model = Net()
    if hvd.rank() == 1:
        probes = [
            DLSCompressor(m, density=0.1, **SPARSE) for m in (model.parameters, Net().parameters)
        ]
        assert all(probe.last_step() is None for probe in probes)
    compression = DLSCompressor(model.parameters, density=0.1, **SPARSE)
    Trainer(model, compression, mode).train(range(3))
    assert compression.last_step().step == 3
    assert_same_on_all_ranks(flat(model))


def test_models_may_be_made_in_another_order_on_each_rank(mode):
    made = {}
    for name in ("ab", "ba")[hvd.rank() % 2]:
        model = Net(seed=ord(name))
        made[name] = model, DLSCompressor(model.parameters, density=0.1, **SPARSE)
    for name in "ab":
        model, compression = made[name]
        Trainer(model, compression, mode).train(range(3))
        assert compression.last_step().step == 3
        assert_same_on_all_ranks(flat(model))


def test_a_model_more_on_one_rank_shifts_keras_names_and_nothing_else(mode):
    def make():
        layers = [keras.layers.Dense(30, "relu"), keras.layers.Dense(5)]
        model = keras.Sequential([keras.layers.Flatten(), *layers])
        model.build([None, 4, 4, 3])
        return model

    if hvd.rank() == 1:
        make()
    model = make()
    variables = [v.value for v in model.trainable_variables]
    compression = DLSCompressor(model.trainable_variables, density=0.1, **SPARSE)
    generator = np.random.default_rng(1)  # hvd.broadcast_variables would wait: it goes by names
    for v in variables:
        v.assign(0.2 * generator.normal(size=v.shape))

    def step(images, labels):
        with tf.GradientTape() as tape:
            loss = cross_entropy(model(images), labels)
        tape = hvd.DistributedGradientTape(tape, compression=compression)
        for v, g in zip(variables, tape.gradient(loss, variables), strict=True):
            v.assign_sub(0.05 * g)

    step = tf.function(step) if mode == "tf.function" else step
    for i in range(3):
        step(*batch(i))
    assert compression.last_step().step == 3
    assert compression.last_step().names[0] == model.trainable_variables[0].path  # as users know it
    assert_same_on_all_ranks(flat(variables))


# A step and its end -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "fails"),
    [
        ({}, "backward"),
        ({"bucket_bytes": 1000}, "forward"),
        ({"bucket_bytes": 1000}, "backward"),
        ({"bucket_bytes": 1000}, "behind"),
        ({"dense_steps": 2}, "behind"),
    ],
    ids=str,
)
def test_a_step_that_fails_on_all_ranks(mode, options, fails):
    """As by tf.debugging.assert_..., or because the data have come to their end."""
    ledger = Ledger(mode, **options)
    ledger.step(0)
    for step in range(1, 5):
        before = ledger.residuals
        ledger.step(step, fails)
        if fails != "behind":  # a state can be saved, and is that of before the step
            for name, residual in ledger.residuals.items():
                np.testing.assert_array_equal(residual, before[name])
        ledger.step(10 + step)
        ledger.assert_nothing_is_lost()
    assert ledger.compression.last_step().step == (9 if fails == "behind" else 5)


def test_a_step_can_be_abandoned_by_hand(mode):
    ledger = Ledger(mode)
    ledger.step(0)
    ledger.step(1, "backward")
    ledger.compression.abandon_step()
    ledger.compression.abandon_step()  # nothing to do
    ledger.compression.load_state_dict(ledger.compression.state_dict())
    ledger.step(2)
    ledger.assert_nothing_is_lost()


def test_horovod_begun_anew_between_steps(mode):
    ledger = Ledger(mode)
    for step in range(6):
        if step in (2, 4):
            hvd.shutdown()
            hvd.init()
        ledger.step(step)
        ledger.assert_nothing_is_lost()
    assert ledger.compression.last_step().step == 6


def test_horovod_begun_anew_in_the_middle_of_a_step(mode):
    ledger = Ledger(mode)
    ledger.step(0)
    ledger.step(1, "backward")
    hvd.shutdown()
    hvd.init()
    ledger.step(2)
    ledger.assert_nothing_is_lost()


# Layers that never arrive -------------------------------------------------------------------------


def test_variables_without_gradients_leave_their_share_to_the_others(mode, caplog):
    used = [tf.Variable(tf.zeros([30, 40]), name="a"), tf.Variable(tf.zeros([50, 20]), name="b")]
    sometimes = tf.Variable(tf.zeros([40, 30]), name="sometimes")
    never = tf.Variable(tf.zeros([100, 60]), name="never")
    embedding = tf.Variable(tf.zeros([90, 10]), name="embedding")  # its gradients are sparse
    variables = [*used, sometimes, never, embedding]
    compression = DLSCompressor(variables, density=0.05, **SPARSE)

    def step(among, *wanted):
        with tf.GradientTape() as tape:
            losses = [tf.reduce_sum(v * g) for v, g in zip(among, wanted, strict=True)]
            loss = tf.add_n([tf.reduce_sum(tf.gather(embedding, [1, 2])), *losses])
        tape = hvd.DistributedGradientTape(tape, compression=compression)
        return tape.gradient(loss, variables)

    steps = [functools.partial(step, among) for among in ([*used, sometimes], used)]
    if mode == "tf.function":
        steps = [tf.function(function) for function in steps]

    def train(which, steps_to_make):
        among = [*used, sometimes][: 3 - which]
        for i in steps_to_make:
            gradients = [tf.constant(whole_numbers(v.shape, i)) for v in among]
            *_, nothing, slices = steps[which](*gradients)
            assert nothing is None
            assert isinstance(slices, tf.IndexedSlices)
        record = compression.last_step()
        assert_same_on_all_ranks(record.k)
        return dict(zip(record.names, record.k.tolist(), strict=True))

    def told(name):
        return sum(name in r.message for r in caplog.records if "share" in r.message)

    with caplog.at_level(logging.INFO, "hvd_dls"):
        k = train(0, range(14))
        assert k["a"] + k["b"] + k["sometimes"] == round(0.05 * 3400)
        assert k["never"] == k["embedding"] == 0
        residual = np.array(compression.state_dict()["models"][0]["residuals"]["sometimes"])
        k = train(1, range(14, 28))
        assert k["a"] + k["b"] == round(0.05 * 3400)
        assert k["sometimes"] == 0
        now = compression.state_dict()["models"][0]["residuals"]["sometimes"]
        np.testing.assert_array_equal(now, residual)
        k = train(0, range(28, 31))
        assert k["a"] + k["b"] + k["sometimes"] == round(0.05 * 3400)
        assert k["sometimes"] > 0
    first = hvd.rank() == 0
    assert [told(name) for name in ("never", "sometimes", "'a'")] == [first, 2 * first, 0]


# State --------------------------------------------------------------------------------------------


def trained(mode, steps=3, **options):
    model = Net()
    compression = DLSCompressor(density=0.05, **SPARSE, **options)
    trainer = Trainer(model, compression, mode)
    trainer.train(range(steps))
    return model, compression, trainer


def assert_refused(compression, trainer, state, message):
    """On every rank, before anything has changed; then training goes on."""
    before = pickle.dumps(compression.state_dict())
    with pytest.raises(DLSError, match=message):
        compression.load_state_dict(state)
    assert pickle.dumps(compression.state_dict()) == before
    trainer.train([7])
    assert_same_on_all_ranks(flat(trainer.model))


def assert_refused_in_the_first_step(mode, state, message, **options):
    compression = DLSCompressor(density=0.05, **SPARSE, **options)
    compression.load_state_dict(state)
    with pytest.raises(Exception, match=message):
        Trainer(Net(), compression, mode).train(range(1))


def copy_of(state):
    return pickle.loads(pickle.dumps(state))


@eagerly
def test_a_rank_does_not_take_another_ranks_state(mode):
    _, compression, trainer = trained(mode)
    first = hvd.broadcast_object(copy_of(compression.state_dict()), root_rank=0)
    assert_refused(compression, trainer, first, "saved by rank 0, but this is rank 1")
    assert_refused_in_the_first_step(mode, first, "saved by rank 0, but this is rank 1")


@eagerly
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_state_that_is_not_finite_is_refused_on_all_ranks(mode, value):
    _, compression, trainer = trained(mode)
    state = copy_of(compression.state_dict())
    if hvd.rank() == 1:
        state["models"][0]["residuals"]["hidden"][17] = value
    message = f"layer 'hidden': residuals hold {value} at entry 17"
    assert_refused(compression, trainer, state, message)
    assert_refused_in_the_first_step(mode, state, message)


@eagerly
def test_a_state_that_sends_more_entries_than_a_layer_has_is_refused(mode):
    _, compression, trainer = trained(mode)
    state = copy_of(compression.state_dict())
    if hvd.rank() == 1:
        state["models"][0]["ratios"][2] += 100_000
    assert_refused(compression, trainer, state, r"layer 'conv': sends 1\d{5} entries")


@eagerly
@pytest.mark.parametrize(
    "empty", [{"version": 1, "models": []}, {"version": 1, "models": [{}]}, {}]
)
def test_an_empty_state_is_refused_by_a_trained_compressor(mode, empty):
    _, compression, trainer = trained(mode)
    assert_refused(compression, trainer, empty, "saved state")


@eagerly
def test_an_empty_state_on_one_rank_only_is_refused_on_all(mode):
    _, compression, trainer = trained(mode)
    own = copy_of(compression.state_dict())
    empty = {"version": 1, "models": []}
    assert_refused(compression, trainer, own if hvd.rank() else empty, "saved state")


@eagerly
def test_a_fresh_compressors_state_can_be_loaded_by_a_fresh_one(mode):
    state = DLSCompressor(density=0.05, **SPARSE).state_dict()
    compression = DLSCompressor(density=0.05, **SPARSE)
    compression.load_state_dict(state)
    Trainer(Net(), compression, mode).train(range(2))
    assert compression.last_step().step == 2


def test_numbers_of_numpy_do_not_get_into_a_state():
    _, compression, _ = trained("tf.function", momentum=np.float32(0.5))
    compression = DLSCompressor(density=np.float32(0.05), min_k=np.int64(2), **SPARSE)
    Trainer(Net(), compression, "tf.function").train(range(1))
    (state,) = compression.state_dict()["models"]
    assert {type(state["config"][option]) for option in ("density", "momentum")} == {float}
    assert type(state["config"]["min_k"]) is int


@eagerly
def test_a_state_is_found_by_what_it_is_of(mode):
    """Not by the order in which models train."""

    def start(seed, width):
        model = Net(seed=seed)
        extra = tf.Variable(tf.ones([5, width]), name="extra")
        model.parameters.append(extra)
        return model

    compression = DLSCompressor(density=0.05, **SPARSE)
    models = [start(1, 3), start(1, 4)]

    def train(compression, models):
        for model in models:
            gradients = [whole_numbers(p.shape, 0) for p in model.parameters]
            reduced(model.parameters, gradients, compression, mode)

    train(compression, models)
    saved = copy_of(compression.state_dict())
    again = DLSCompressor(density=0.05, **SPARSE)
    again.load_state_dict(saved)
    train(again, models[::-1])
    assert [m["step"] for m in again.state_dict()["models"]] == [2, 2]
    with pytest.raises(StateMismatchError):
        again.load_state_dict({"version": 1, "models": saved["models"][:1]})
