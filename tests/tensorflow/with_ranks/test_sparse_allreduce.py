"""exchange="sparse_allreduce": owners add up, and hand the largest sums out."""

import copy
import tempfile
import time

import horovod.tensorflow as hvd
import numpy as np
import pytest
import tensorflow as tf

from hvd_dls.tensorflow import DLSCompressor, load_checkpoint, save_checkpoint
from hvd_dls.tensorflow.branches import run_at_once
from tests.tensorflow.with_ranks.training import (
    SPARSE,
    Net,
    Trainer,
    assert_same_on_all_ranks,
    flat,
    held,
    held_on_all_ranks,
    reduced,
    traced,
    whole_numbers,
)

OWNERS = {"exchange": "sparse_allreduce", **SPARSE}
SHAPES = [(40, 30), (7, 5, 3, 3), (300, 2)]


class Matrices(tf.Module):
    """Without vectors: Horovod adds those up in an order that depends on when they arrive."""

    def __init__(self):
        generator = np.random.default_rng(1)
        shapes = {"first": (48, 64), "second": (64, 5)}
        self.parameters = [
            tf.Variable(generator.normal(size=shape) * 0.2, name=name, dtype="float32")
            for name, shape in shapes.items()
        ]

    def __call__(self, images):
        first, second = self.parameters
        return tf.nn.relu(tf.reshape(images, [tf.shape(images)[0], 48]) @ first) @ second


def variables_of(dtype="float32"):
    return [tf.Variable(tf.zeros(s, dtype), name=n) for s, n in zip(SHAPES, "abc", strict=True)]


@pytest.mark.parametrize("values", ["float32", "float16"])
def test_all_that_was_accumulated_is_applied_or_waits_on_some_rank(values):
    """To the bit; and traced it is what it is eagerly."""
    variables, out = variables_of(), {}
    options = OWNERS | {"bucket_bytes": 6000, "values": values}  # three buckets
    for mode in ("eager", "tf.function"):
        compression = DLSCompressor(variables, density=0.1, **options)
        came, accumulated = ([np.zeros(shape) for shape in SHAPES] for _ in range(2))
        out[mode] = []
        for step in range(8):
            gradients = [whole_numbers(shape, step) for shape in SHAPES]
            of_step = reduced(variables, gradients, compression, mode, op=hvd.Sum)
            out[mode] += [gradient.numpy() for gradient in of_step]
            for i, shape in enumerate(SHAPES):
                came[i] += of_step[i].numpy()
                for rank in range(hvd.size()):
                    accumulated[i] += whole_numbers(shape, step, rank)
        for i, waits in enumerate(held_on_all_ranks(compression).values()):
            assert np.abs(waits).sum() > 0
            np.testing.assert_array_equal(came[i] + waits.reshape(SHAPES[i]), accumulated[i])
        record = compression.last_step()
        assert sum(np.count_nonzero(each) for each in out[mode][-3:]) <= record.k.sum()
        assert_same_on_all_ranks(np.concatenate([each.ravel() for each in out[mode]]))
        assert_same_on_all_ranks(record.k)
    for eager, in_graph in zip(*out.values(), strict=True):
        np.testing.assert_array_equal(eager, in_graph)


@pytest.mark.parametrize("mode", ["tf.function"])
def test_parameters_and_ratios_agree_to_the_bit_and_the_state_goes_on(mode):
    """Ranks trace the step anew at different times."""
    options = OWNERS | {"density": 0.05, "momentum": 0.9, "dense_steps": 1}
    model, compression = Matrices(), DLSCompressor(**options)
    trainer = Trainer(model, compression, mode)
    trainer.train(range(14))
    trainer.train([14], size=6 if hvd.rank() else 3)
    trainer.train([15], size=3)
    assert trainer.traces == 2
    assert compression.last_step().step == 16
    assert_same_on_all_ranks(compression.last_step().k)
    assert_same_on_all_ranks(flat(model.parameters))
    weights = [p.numpy() for p in model.parameters]
    state = copy.deepcopy(compression.state_dict())
    trainer.train(range(16, 20))
    there = flat(model.parameters)
    again, restarted = Matrices(), DLSCompressor(**options)
    for parameter, saved in zip(again.parameters, weights, strict=True):
        parameter.assign(saved)
    restarted.load_state_dict(state)
    Trainer(again, restarted, mode).train(range(16, 20))
    np.testing.assert_array_equal(flat(again.parameters), there)


@pytest.mark.parametrize("mode", ["eager"])
def test_at_density_one_training_equals_dense_training(mode):
    trained = []
    for compression in (hvd.Compression.none, DLSCompressor(density=1, **OWNERS)):
        model = Net()
        Trainer(model, compression, mode, lr=0.01).train(range(6))
        trained.append(flat(model))
    assert_same_on_all_ranks(trained[1])
    np.testing.assert_allclose(trained[1], trained[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
def test_a_gradient_that_is_not_finite_refuses_the_step_on_all_ranks(nonfinite):
    shapes = {"first": (30, 20), "vector": (7,), "second": (20, 30)}
    variables = [tf.Variable(tf.zeros(s), name=name) for name, s in shapes.items()]
    compression = DLSCompressor(density=0.1, nonfinite=nonfinite, **OWNERS)

    def step(number, bad=None):
        gradients = [whole_numbers(shape, number) for shape in shapes.values()]
        if bad is not None and hvd.rank() == hvd.size() - 1:
            gradients[list(shapes).index(bad)].reshape(-1)[3] = np.nan
        return reduced(variables, gradients, compression)

    step(0)
    before = held(compression)
    for number, bad in enumerate(["second", "vector"], start=1):
        if nonfinite == "raise":
            with pytest.raises(tf.errors.OpError, match=f"'{bad}' on rank {hvd.size() - 1};"):
                step(number, bad)
        else:
            assert not any(np.any(out) for out in step(number, bad))
        for name, now in held(compression).items():
            np.testing.assert_array_equal(now, before[name])
    out = step(3)
    assert compression.last_step().step == 2
    assert_same_on_all_ranks(np.concatenate([each.numpy().ravel() for each in out]))


@pytest.mark.parametrize("apart", ["attempt", "step"])
def test_a_rank_in_another_step_is_told_on_all_ranks(apart):
    """Where it has made another step, it sends other numbers of entries, too."""
    variables, gradients = variables_of(), [whole_numbers(shape, 0) for shape in SHAPES]
    compression = DLSCompressor(variables, density=0.1, bucket_bytes=6000, **OWNERS)
    reduced(variables, gradients, compression)
    state = copy.deepcopy(compression.state_dict())
    session = compression._bindings[0].session
    if hvd.rank() == hvd.size() - 1:
        if apart == "attempt":
            session._clock.abandon()
        else:
            controller = session.memory.controller
            controller.step += 1
            controller.k[:] += 40
    with pytest.raises(tf.errors.OpError, match="this rank is in step"):
        reduced(variables, gradients, compression)
    compression.load_state_dict(state)
    out = reduced(variables, gradients, compression)
    assert compression.last_step().step == 2
    assert_same_on_all_ranks(np.concatenate([each.numpy().ravel() for each in out]))


def test_a_checkpoint_holds_all_that_waits_and_training_goes_on():
    folder = hvd.broadcast_object(tempfile.mkdtemp(), name="folder")
    models = Net(), Net()
    compression, loaded = (DLSCompressor(density=0.05, **OWNERS) for _ in range(2))
    Trainer(models[0], compression, "tf.function").train(range(4))
    saved, again = (tf.train.Checkpoint(model=model) for model in models)
    save_checkpoint(folder, saved, compression)
    load_checkpoint(folder, again, loaded)
    for name, waits in held(compression).items():
        assert waits.any()
        np.testing.assert_array_equal(held(loaded)[name], waits)
    Trainer(models[1], loaded, "tf.function").train(range(4, 6))
    assert loaded.last_step().step == 6
    assert_same_on_all_ranks(flat(models[1]))


def test_owners_in_an_elastic_job_are_refused(monkeypatch):
    monkeypatch.setenv("HOROVOD_ELASTIC", "1")
    compression = DLSCompressor(**OWNERS)
    with pytest.raises(Exception, match="exchange='sparse_allreduce' in an elastic job"):
        reduced(variables_of(), [whole_numbers(s, 0) for s in SHAPES], compression, "eager")


def test_a_step_that_fails_on_all_ranks_between_two_operations_of_a_bucket():
    """On a rank that is late, behind both: what other ranks wait for is sent, error or not."""
    variables, late = variables_of(), hvd.rank() == hvd.size() - 1
    compression = DLSCompressor(variables, density=0.1, bucket_bytes=6000, **OWNERS)
    fails = [False]

    def maybe(gradient):
        if fails[0]:
            time.sleep(0.3)  # other gradients are on their way by then
            raise RuntimeError("broken on purpose")
        return gradient

    @tf.custom_gradient
    def breakable(x):
        def gradient(upstream):
            out = tf.numpy_function(maybe, [upstream], tf.float32)
            run_at_once(out)  # as operations are that have no side effects
            return tf.ensure_shape(out, x.shape)

        return tf.identity(x), gradient

    @traced
    def step(first, *others):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(breakable(variables[0]) * first)
            for v, g in zip(variables[1:], others, strict=True):
                loss += tf.reduce_sum(v * g)
        tape = hvd.DistributedGradientTape(tape, compression=compression, op=hvd.Sum)
        return tape.gradient(loss, variables)

    came, accumulated = ([np.zeros(shape) for shape in SHAPES] for _ in range(2))
    for number in range(6):
        gradients = [tf.constant(whole_numbers(shape, number)) for shape in SHAPES]
        fails[0] = number in (1, 3)
        if fails[0]:
            before = held(compression)
            time.sleep(0.8 * late)
            with pytest.raises(tf.errors.OpError, match="broken on purpose"):
                step(*gradients)
            if number == 1:
                compression.abandon_step()
            for name, now in held(compression).items():
                np.testing.assert_array_equal(now, before[name])
            continue
        out = step(*gradients)
        for i, shape in enumerate(SHAPES):
            came[i] += out[i].numpy()
            accumulated[i] += sum(whole_numbers(shape, number, r) for r in range(hvd.size()))
    assert compression.last_step().step == 4
    for i, waits in enumerate(held_on_all_ranks(compression).values()):
        np.testing.assert_array_equal(came[i] + waits.reshape(SHAPES[i]), accumulated[i])
