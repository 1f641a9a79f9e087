"""What cannot work ends in the same clear error on every rank, never in a hang."""

import re

import horovod.tensorflow as hvd
import numpy as np
import pytest
import tensorflow as tf

from hvd_dls import DLSError
from hvd_dls.tensorflow import DLSCompressor
from tests.tensorflow.with_ranks.training import (
    SPARSE,
    Net,
    Trainer,
    assert_same_on_all_ranks,
    flat,
    reduced,
    whole_numbers,
)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_raises_the_same_error_on_every_rank(poison):
    variables = [tf.Variable(tf.zeros([20, 30]), name=str(i)) for i in range(3)]
    compression = DLSCompressor(variables, density=0.05, **SPARSE)

    @tf.function
    def gradients_of(*gradients):
        return reduced(variables, gradients, compression, "plain", op=hvd.Sum)

    gradients_of(*[tf.constant(whole_numbers([20, 30], 0)) for _ in variables])
    before = {n: r.copy() for n, r in compression.state_dict()["models"][0]["residuals"].items()}
    poisoned = [whole_numbers([20, 30], 1) for _ in variables]
    if hvd.rank() == 1:
        poisoned[0][3, 4] = poisoned[2][0, 0] = poison
    with pytest.raises(tf.errors.OpError, match=r"'0' on rank 1, layer '2' on rank 1") as error:
        gradients_of(*map(tf.constant, poisoned))
    assert "NonFiniteGradientError" in str(error.value)
    for name, now in compression.state_dict()["models"][0]["residuals"].items():
        np.testing.assert_array_equal(now, before[name])  # the step did not take place
    gradients_of(*[tf.constant(whole_numbers([20, 30], 2)) for _ in variables])  # and on it goes
    assert compression.last_step().step == 2


def test_a_nan_does_not_leave_other_ranks_waiting_for_gradients_that_go_dense(mode):
    """An error that came too early would, now and then."""
    shapes = [(20, 30) if i % 5 == 0 else (7,) for i in range(40)]
    variables = [tf.Variable(tf.zeros(shape)) for shape in shapes]
    compression = DLSCompressor(variables, density=0.05, **SPARSE)

    def gradients_of(*gradients):
        return reduced(variables, gradients, compression, "plain")

    gradients_of = tf.function(gradients_of) if mode == "tf.function" else gradients_of
    for step in range(10):
        gradients = [whole_numbers(shape, step) for shape in shapes]
        if step % 3 == 2:
            if step % hvd.size() == hvd.rank():
                gradients[10][1, 2] = np.nan
            with pytest.raises(tf.errors.OpError, match="NaN or Inf"):
                gradients_of(*map(tf.constant, gradients))
        else:
            gradients_of(*map(tf.constant, gradients))
    assert compression.last_step().step == 7


@pytest.mark.parametrize("who", ["class", "instance"])
def test_two_models_of_the_same_shapes_that_cannot_be_told_apart(who, bare_class):
    """Eagerly, Horovod's traced function runs again with the other model's variables."""
    compression = bare_class if who == "class" else DLSCompressor(density=0.05, **SPARSE)
    models = [Net(seed=1), Net(seed=2)]
    trainers = [Trainer(model, compression, "eager") for model in models]
    trainers[0].train(range(3))
    residuals = compression.state_dict()["models"][0]["residuals"]
    before = {name: residual.copy() for name, residual in residuals.items()}
    with pytest.raises(tf.errors.InvalidArgumentError, match="an instance of its own"):
        trainers[1].train(range(1))
    for name, residual in residuals.items():
        np.testing.assert_array_equal(residual, before[name])
    trainers[0].train(range(3, 5))
    assert compression.last_step().step == 5
    for own in (DLSCompressor(**SPARSE), DLSCompressor(models[1].parameters, **SPARSE)):
        Trainer(models[1], own, "eager").train(range(3))
        assert own.last_step().step == 3
    for model in models:
        assert_same_on_all_ranks(flat(model))


def test_a_variable_that_is_given_twice():
    """As with two parts of a model that share a layer."""
    shared, other = (tf.Variable(tf.zeros([30, 40]), name=name) for name in ("shared", "other"))
    gradients = [whole_numbers([30, 40], 0)] * 3
    compression = DLSCompressor(density=0.05, **SPARSE)
    with pytest.raises(Exception, match="DLSError: variable 'shared:0' is twice in the list"):
        reduced([shared, other, shared], gradients, compression, "eager")
    reduced([shared, other], gradients[:2], compression, "eager")
    assert compression.last_step().step == 1


def test_two_models_of_the_same_shapes_that_can_be_told_apart(bare_class):
    """A tape inside tf.function is traced for each model, so each has residuals of its own."""
    models = [Net(seed=1), Net(seed=2)]
    trainers = [Trainer(model, bare_class, "tf.function") for model in models]
    for step in range(3):
        for trainer in trainers:
            trainer.train([step])
    assert [state["step"] for state in bare_class.state_dict()["models"]] == [3, 3]
    alone = Net(seed=2)
    Trainer(alone, DLSCompressor(density=0.05, **SPARSE), "tf.function").train(range(3))
    np.testing.assert_array_equal(flat(models[1]), flat(alone))


def test_the_same_variables_in_another_order_that_is_not_seen():
    variables = [tf.Variable(tf.zeros([30, 40]), name=name) for name in "ab"]
    compression = DLSCompressor(density=0.05, **SPARSE)
    gradients = [whole_numbers([30, 40], 0)] * 2
    reduced(variables, gradients, compression, "eager")
    with pytest.raises(tf.errors.InvalidArgumentError, match="in another order"):
        reduced(variables[::-1], gradients, compression, "eager")


def test_variables_as_arguments_of_ones_own_function(bare_class):
    """Then TensorFlow uses one trace for two models of the same shapes."""

    @tf.function
    def step(*variables):
        return reduced(
            variables, [whole_numbers(v.shape, 0) for v in variables], bare_class, "plain"
        )

    models = [[tf.Variable(tf.zeros([30, 40])), tf.Variable(tf.zeros([50, 60]))] for _ in range(2)]
    step(*models[0])
    step(*models[0])
    with pytest.raises(tf.errors.InvalidArgumentError, match="an instance of its own"):
        step(*models[1])


@pytest.mark.parametrize("mode", ["tf.function"])
@pytest.mark.parametrize(
    ("option", "value", "other"),
    [("density", 0.05, 0.06), ("exchange", "allgather", "sparse_allreduce")],
)
def test_ranks_with_other_options_are_named(mode, option, value, other):
    options = {option: value if hvd.rank() == 0 else other}
    compression = DLSCompressor(**SPARSE, **options)
    words = f"rank 1 has option {option}: {other!r}, rank 0: {value!r}"
    with pytest.raises(Exception, match=re.escape(words)):
        Trainer(Net(), compression, mode).train(range(1))


@pytest.mark.parametrize("mode", ["tf.function"])
def test_ranks_with_other_variables_are_named(mode):
    variables = [tf.Variable(tf.zeros([30, 40]), name="left" if hvd.rank() == 0 else "right")]
    with pytest.raises(Exception, match=r"rank 1 has layer 0: 'right' .*, rank 0: 'left' "):
        reduced(variables, [whole_numbers([30, 40], 0)], DLSCompressor(**SPARSE), mode)


def test_a_density_too_low_for_the_model_says_what_would_do(mode):
    with pytest.raises(Exception, match=r"density=0\.0001 gives .*raise density to at least"):
        Trainer(Net(), DLSCompressor(density=1e-4, **SPARSE), mode).train(range(1))


def test_adasum_is_refused(mode):
    with pytest.raises(Exception, match="Adasum"):
        Trainer(Net(), DLSCompressor(**SPARSE), mode, op=hvd.Adasum).train(range(1))
    with pytest.raises(DLSError, match="Adasum"):
        hvd.allreduce(tf.zeros([4, 4]), op=hvd.Adasum, compression=DLSCompressor)


@pytest.mark.parametrize("variables", [3, [3], ["w"], [np.zeros(3)]])
def test_what_is_no_variable_is_refused(variables):
    with pytest.raises(DLSError, match=r"variables takes|takes variables"):
        DLSCompressor(variables)


def test_variables_that_are_not_floating_point_are_refused():
    with pytest.raises(DLSError, match="'w:0' has type int32"):
        DLSCompressor([tf.Variable([1, 2], name="w")])
