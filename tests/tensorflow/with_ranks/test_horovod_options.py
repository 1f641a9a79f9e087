"""Everything Horovod offers, and every kind of variable and gradient, with the compressor in it."""

import logging
import os

import horovod.tensorflow as hvd
import numpy as np
import pytest
import tensorflow as tf

from hvd_dls.tensorflow import DLSCompressor
from hvd_dls.tensorflow.exchange import Exchange
from tests.tensorflow.with_ranks.training import (
    SPARSE,
    Net,
    Trainer,
    assert_same_on_all_ranks,
    batch,
    cross_entropy,
    flat,
    reduced,
    traced,
    whole_numbers,
)


def compressor(variables=None, **options):
    return DLSCompressor(variables, **{"density": 0.05, **SPARSE, **options})


@pytest.mark.parametrize(
    ("mode", "dtype"),
    [("tf.function", "float16"), ("eager", "bfloat16"), ("tf.function", "float32"),
     ("eager", "float32"), ("eager", "float64")],
)  # fmt: skip
def test_gradient_types(mode, dtype):
    variables = [tf.Variable(tf.ones(s, dtype)) for s in [(48, 64), (64,), (64, 5)]]
    compression = compressor()
    for step in range(4):
        gradients = [whole_numbers(v.shape, step) for v in variables]
        out = reduced(variables, gradients, compression, mode)
        for variable, gradient in zip(variables, out, strict=True):
            assert gradient.dtype == variable.dtype
            assert gradient.shape == variable.shape
            variable.assign_sub(tf.cast(0.01, dtype) * gradient)
    assert compression.last_step().step == 4
    assert_same_on_all_ranks(flat(variables))


@pytest.mark.parametrize(
    ("mode", "dtype", "groups"),
    [("eager", "float16", 2), ("tf.function", "bfloat16", "lists"), ("tf.function", "float32", 2)],
)  # fmt: skip
def test_groups_give_the_same_as_no_groups(mode, groups, dtype):
    trained = []
    for grouped in (False, True):
        model = Net(dtype)
        p = model.parameters
        lists = [p[:3], p[3:5]] if groups == "lists" else groups
        compression = compressor()
        Trainer(model, compression, mode, groups=lists if grouped else None).train(range(4))
        assert compression.last_step().step == 4
        trained.append(flat(model))
        assert_same_on_all_ranks(trained[-1])
    # Biases go dense, and Horovod may add ranks up in another order.
    tolerance = 1e-5 if dtype == "float32" else 0.05
    np.testing.assert_allclose(*trained, rtol=tolerance, atol=tolerance)


def test_variables_without_a_gradient(mode):
    """Those given take part as soon as they get one; without, a model is what has gradients."""
    shapes = [(20, 30), (20, 30), (20, 30)]
    for given in (True, False):
        variables = [tf.Variable(tf.zeros(s), name=n) for s, n in zip(shapes, "abc", strict=True)]
        compression = compressor(variables if given else None)
        for step in range(6):
            gradients = [whole_numbers(s, step) for s in shapes]
            if step < 3:
                gradients[1] = None
            out = reduced(variables, gradients, compression, mode)
            assert (out[1] is None) == (step < 3)
            for variable, gradient in zip(variables, out, strict=True):
                if gradient is not None:
                    variable.assign_sub(gradient)
        models = compression.state_dict()["models"]
        assert [m["step"] for m in models] == ([6] if given else [3, 3])
        assert compression.last_step().names == ("a", "b", "c")
        assert_same_on_all_ranks(flat(variables))


def test_variables_are_told_apart_by_identity_not_by_order():
    """Another order of the same variables is the same model, with the same residuals."""
    shape = (20, 30)
    variables = [tf.Variable(tf.zeros(shape), name=n) for n in "abc"]
    compression = compressor()
    received = np.zeros((3, *shape))
    for step in range(4):
        order = [0, 1, 2] if step % 2 else [2, 0, 1]
        gradients = [(i + 1) * whole_numbers(shape, step) for i in order]
        out = reduced([variables[i] for i in order], gradients, compression, op=hvd.Sum)
        for i, gradient in zip(order, out, strict=True):
            received[i] += gradient.numpy()
    residuals = compression.state_dict()["models"][0]["residuals"]
    for i, name in enumerate("abc"):
        kept = hvd.allreduce(tf.constant(residuals[name]), op=hvd.Sum, name=f"kept.{name}").numpy()
        came = sum(
            (i + 1) * whole_numbers(shape, step, rank)
            for step in range(4)
            for rank in range(hvd.size())
        )
        np.testing.assert_array_equal(received[i] + kept.reshape(shape), came)


def test_two_variables_with_one_and_the_same_gradient(mode):
    a, b = (tf.Variable(tf.zeros([30, 40]), name=name) for name in "ab")
    compression = compressor()

    def gradient():
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum((a + b) * whole_numbers([30, 40], 0))
        return hvd.DistributedGradientTape(tape, compression=compression).gradient(loss, [a, b])

    out = (tf.function(gradient) if mode == "tf.function" else gradient)()
    assert compression.last_step().names == ("a", "b")
    for gradient in out:
        assert_same_on_all_ranks(gradient.numpy())


@pytest.mark.parametrize("sparse_as_dense", [False, True])
def test_indexed_slices_keep_horovods_path(mode, sparse_as_dense):
    embedding = tf.Variable(tf.random.stateless_normal([50, 16], [1, 2]), name="embedding")
    out = tf.Variable(tf.random.stateless_normal([48, 5], [1, 3]), name="out")
    compression = compressor()

    def step(words):
        with tf.GradientTape() as tape:
            logits = tf.reshape(tf.gather(embedding, words), [4, 48]) @ out
            loss = cross_entropy(logits, tf.constant([0, 1, 2, 3]))
        tape = hvd.DistributedGradientTape(
            tape, compression=compression, sparse_as_dense=sparse_as_dense
        )
        gradients = tape.gradient(loss, [embedding, out])
        for variable, gradient in zip([embedding, out], gradients, strict=True):
            variable.assign_sub(0.1 * tf.convert_to_tensor(gradient))
        assert isinstance(gradients[0], tf.IndexedSlices) != sparse_as_dense

    step = tf.function(step) if mode == "tf.function" else step
    for number in range(4):
        step(tf.constant(np.random.default_rng([number, hvd.rank()]).integers(0, 50, (4, 3))))
    names = compression.last_step().names
    assert names == (("embedding", "out") if sparse_as_dense else ("out",))
    assert_same_on_all_ranks(flat([embedding, out]))


@pytest.mark.parametrize(
    ("mode", "shared"),
    [("eager", "class"), ("eager", "instance"), ("tf.function", "two instances")],
)  # fmt: skip
def test_two_models_of_different_shapes(mode, shared, bare_class):
    models = [Net(), [tf.Variable(tf.ones([48, 64])), tf.Variable(tf.ones([64, 9]))]]
    first = bare_class if shared == "class" else compressor()
    second = compressor() if shared == "two instances" else first
    trainer = Trainer(models[0], first, mode)
    for step in range(4):
        trainer.train([step])
        gradients = [whole_numbers(v.shape, step) for v in models[1]]
        for v, g in zip(models[1], reduced(models[1], gradients, second, mode), strict=True):
            v.assign_sub(g)
    states = [state for c in {first, second} for state in c.state_dict()["models"]]
    assert [state["step"] for state in states] == [4, 4]
    assert_same_on_all_ranks(flat(models[0]))
    assert_same_on_all_ranks(flat(models[1]))


def test_two_models_in_one_function():
    """As adversarial nets are trained; here even of the same shapes."""
    models = [Net(seed=1), Net(seed=2)]
    compression = compressor()
    trainers = [Trainer(model, compression, "plain") for model in models]

    @tf.function
    def step(images, labels):
        for trainer in trainers:
            trainer.step(images, labels)

    for number in range(5):
        step(*batch(number))
    states = compression.state_dict()["models"]
    assert [state["step"] for state in states] == [5, 5]
    assert not np.array_equal(states[0]["residuals"]["conv"], states[1]["residuals"]["conv"])
    for model in models:
        assert_same_on_all_ranks(flat(model))


def test_several_steps_in_one_function():
    model = Net()
    compression = compressor()
    trainer = Trainer(model, compression, "plain")

    @tf.function
    def steps(images, labels):
        for _ in range(2):
            trainer.step(images, labels)
        for _ in tf.range(3):
            trainer.step(images, labels)

    steps(*batch(0))
    steps(*batch(1))
    assert compression.last_step().step == 10
    assert_same_on_all_ranks(flat(model))


def test_ranks_trace_a_function_anew_in_different_steps():
    """As for a smaller batch, which they have at different times; none must wait for the others."""
    trainer = Trainer(Net(), compressor(), "tf.function")
    for step, size in enumerate([6, 6, 3, 6] if hvd.rank() else [6, 6, 6, 3]):
        trainer._step(*batch(step, size=size))
    assert trainer.traces == 2
    assert_same_on_all_ranks(flat(trainer.model))


@pytest.fixture
def branches(monkeypatch):
    """Horovod's conditions in the graph that was traced last, by call of the compressor."""
    graphs, check = [], Exchange._check

    def checked(self, variables, in_graph):
        graphs.append(tf.compat.v1.get_default_graph())
        return check(self, variables, in_graph)

    monkeypatch.setattr(Exchange, "_check", checked)
    return lambda: [x for x in graphs[-1].get_operations() if x.type == "If"]


def test_gradients_are_reduced_at_once_not_one_after_the_other(branches):
    model = Net()
    Trainer(model, compressor(), "tf.function").train(range(3))
    assert len(branches()) == len(model.parameters)
    assert not any(set(branch.control_inputs) & set(branches()) for branch in branches())


def test_a_step_begins_behind_the_reductions_of_the_one_before_in_the_same_function(branches):
    trainer = Trainer(Net(), compressor(), "plain")

    @traced
    def steps(*of):
        trainer.step(*of)
        trainer.step(*of)

    steps(*batch(0))
    n = len(trainer.model.parameters)
    assert len(branches()) == 2 * n
    freed, graph = set(branches()[: n - 1]), branches()[0].graph
    assert any(freed <= set(operation.control_inputs) for operation in graph.get_operations())


def test_functions_run_eagerly_for_debugging():
    trained = []
    for eagerly in (False, True):
        tf.config.run_functions_eagerly(eagerly)
        try:
            model, compression = Net(), compressor()
            Trainer(model, compression, "tf.function").train(range(4))
        finally:
            tf.config.run_functions_eagerly(False)
        assert compression.last_step().step == 4
        trained.append(flat(model))
        assert_same_on_all_ranks(trained[-1])
    np.testing.assert_allclose(*trained, rtol=1e-5, atol=1e-6)


def test_direct_allreduce_goes_dense_and_is_said_once(caplog):
    """Outside of tape and optimizer nobody knows whose gradient it is."""
    compression = compressor()
    with caplog.at_level(logging.WARNING, logger="hvd_dls"):
        for step in range(2):
            mine = tf.constant(whole_numbers([30, 40], step))
            out = hvd.allreduce(mine, compression=compression, op=hvd.Sum, name="direct")
            expected = sum(whole_numbers([30, 40], step, rank) for rank in range(hvd.size()))
            np.testing.assert_array_equal(out, expected)
    assert len([r for r in caplog.records if "no known variable" in r.message]) == 1


def test_a_compressor_made_in_each_step_is_told_once(caplog, monkeypatch):
    """Each begins without what the one before has kept."""
    monkeypatch.setattr(DLSCompressor, "_warned_of_another", False)
    variables = [tf.Variable(tf.zeros([30, 40])), tf.Variable(tf.zeros([30, 40]))]
    gradients = [tf.constant(whole_numbers([30, 40], 0))]
    made = []  # by Horovod, which never forgets a compressor
    with caplog.at_level(logging.WARNING, logger="hvd_dls"):
        for variable in [*variables, *variables, variables[0]]:
            told = [r for r in caplog.records if "before the loop" in r.message]
            assert len(told) == (len(made) > 2)
            made.append(DLSCompressor(density=0.05, **SPARSE))
            reduced([variable], gradients, made[-1], "eager")
    assert len([r for r in caplog.records if "before the loop" in r.message]) == 1


def test_variables_that_were_not_given_go_dense(mode, caplog):
    model = Net()
    compression = compressor(model.parameters[:2])
    with caplog.at_level(logging.WARNING, logger="hvd_dls"):
        Trainer(model, compression, mode).train(range(3))
    assert len([r for r in caplog.records if "no known variable" in r.message]) == 1
    assert compression.last_step().names == ("conv",)
    assert_same_on_all_ranks(flat(model))


@pytest.mark.skipif(
    int(os.environ["HVD_DLS_TEST_RANKS"]) < 4, reason="needs two process sets of two ranks"
)
@pytest.mark.parametrize(
    ("mode", "exchange"), [("eager", "allgather"), ("tf.function", "sparse_allreduce")]
)
def test_process_sets(mode, exchange):
    halves = [hvd.add_process_set([0, 1]), hvd.add_process_set([2, 3])]
    mine = halves[hvd.rank() // 2]
    model = Net()
    compression = compressor(exchange=exchange)
    Trainer(model, compression, mode, process_set=mine).train(range(4))
    assert compression.last_step().step == 4
    assert compression.state_dict()["models"][0]["world_size"] == 2
    everyone = hvd.allgather(tf.constant(flat(model)[None]), name="sets").numpy()
    np.testing.assert_array_equal(everyone[0], everyone[1])
    np.testing.assert_array_equal(everyone[2], everyone[3])
    assert not np.array_equal(everyone[0], everyone[2])
    for process_set in halves:
        hvd.remove_process_set(process_set)
