"""Agreement, conservation, and density 1 = dense: on unmodified Horovod, eagerly and traced."""

import horovod.tensorflow as hvd
import numpy as np
import pytest
import tensorflow as tf

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


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("eager", {}),
        ("tf.function", {}),
        ("tf.function", {"strategy": "layerwise"}),
        ("eager", {"prior": "weight_norm"}),
        ("tf.function", {"prior": "uniform", "tail": "laplace"}),
        ("eager", {"pair_steps": 2, "adjust_every": 3}),
    ],
    ids=str,
)
def test_parameters_and_ratios_agree_to_the_bit(mode, options):
    model = Net()
    compressor = DLSCompressor(density=0.05, **SPARSE, **options)
    trainer = Trainer(model, compressor, mode)
    trainer.train(range(2))
    first = compressor.last_step().k
    trainer.train(range(2, 12))
    record = compressor.last_step()
    assert record.step == 12
    assert record.names == ("conv", "hidden", "out")
    assert record.k.sum() == round(0.05 * record.sizes.sum())
    assert ("layerwise" in options.values()) == np.array_equal(record.k, first)
    assert_same_on_all_ranks(record.k)
    assert_same_on_all_ranks(flat(model))
    assert np.isfinite(flat(model)).all()


def test_the_bare_class_can_be_passed_and_asked(mode, bare_class):
    model = Net()
    assert bare_class.last_step() is None
    Trainer(model, bare_class, mode).train(range(3))
    assert bare_class.last_step().step == 3
    assert_same_on_all_ranks(flat(model))


def test_ratios_move_without_a_retrace_and_a_retrace_keeps_residuals(mode):
    model = Net()
    compressor = DLSCompressor(density=0.05, **SPARSE)
    trainer = Trainer(model, compressor, mode)
    trainer.train(range(1))
    first = compressor.last_step().k
    trainer.train(range(1, 8))
    assert not np.array_equal(compressor.last_step().k, first)
    if mode == "tf.function":
        assert trainer.traces == 1
    trainer.train([8], size=4)  # a smaller last batch
    trainer.train([9])
    if mode == "tf.function":
        assert trainer.traces == 2
    assert compressor.last_step().step == 10
    assert len(compressor.state_dict()["models"]) == 1
    assert_same_on_all_ranks(flat(model))


@pytest.mark.parametrize(
    ("mode", "dtype"),
    [("eager", "float32"), ("tf.function", "float32"), ("tf.function", "float64")],
)
def test_nothing_is_lost(mode, dtype):
    """What all ranks received plus what each keeps is what all gradients came to, exactly."""
    shapes = [(30, 40), (3, 3, 4, 8), (7, 11)]
    variables = [tf.Variable(tf.zeros(shape, dtype)) for shape in shapes]
    compressor = DLSCompressor(variables, density=0.05, **SPARSE)
    received = [np.zeros(shape) for shape in shapes]
    for step in range(6):
        gradients = [whole_numbers(shape, step) for shape in shapes]
        out = reduced(variables, gradients, compressor, mode, op=hvd.Sum)
        for total, gradient in zip(received, out, strict=True):
            total += gradient.numpy()
    residuals = compressor.state_dict()["models"][0]["residuals"]
    assert len(residuals) == 3
    for i, residual in enumerate(residuals.values()):
        kept = hvd.allreduce(tf.constant(residual), op=hvd.Sum, name=f"kept.{i}").numpy()
        accumulated = sum(
            whole_numbers(shapes[i], step, rank) for step in range(6) for rank in range(hvd.size())
        )
        assert np.array_equal(received[i] + kept.reshape(shapes[i]), accumulated)


def test_nothing_is_lost_where_sums_are_subnormal(mode):
    """TensorFlow's own threads take such numbers for zero; its gradients, here, are none."""

    def gradient(step, rank=None):
        return (-1) ** step * (128 + whole_numbers([40, 50], step, rank)) * np.float32(2**-132)

    variable = tf.Variable(tf.zeros([40, 50]))
    compressor = DLSCompressor([variable], density=0.05, **SPARSE)
    received = np.zeros([40, 50])
    for step in range(6):
        (out,) = reduced([variable], [gradient(step)], compressor, mode, op=hvd.Sum)
        received += out.numpy()
    (residual,) = compressor.state_dict()["models"][0]["residuals"].values()
    assert (np.abs(residual[residual != 0]) < np.finfo(np.float32).tiny).any()
    everyone = hvd.allgather(tf.constant(residual[None]), name="kept").numpy()
    accumulated = sum(gradient(step, rank) for step in range(6) for rank in range(hvd.size()))
    kept = everyone.astype(np.float64).sum(axis=0).reshape(40, 50)
    assert np.array_equal(received + kept, accumulated)


@pytest.mark.parametrize(
    ("mode", "dtype", "horovod_options"),
    [
        ("eager", "float32", {"op": hvd.Average}),
        ("tf.function", "float32", {"op": hvd.Average}),
        ("eager", "float32", {"op": hvd.Sum}),
        ("tf.function", "float64", {"gradient_predivide_factor": 1.5}),
    ],
    ids=["eager-average", "tf.function-average", "eager-sum", "tf.function-predivide"],
)
def test_at_density_one_training_equals_dense_training(mode, dtype, horovod_options):
    trained = []
    for compression in (hvd.Compression.none, DLSCompressor(density=1, **SPARSE)):
        model = Net(dtype)
        Trainer(model, compression, mode, lr=0.01, **horovod_options).train(range(6))
        trained.append(flat(model))
    assert_same_on_all_ranks(trained[1])
    tolerance = 1e-12 if dtype == "float64" else 1e-5
    np.testing.assert_allclose(trained[1], trained[0], rtol=tolerance, atol=tolerance)


def test_at_density_one_the_cost_rule_makes_it_dense_training_itself(mode):
    trained = []
    for compression in (hvd.Compression.none, DLSCompressor(density=1)):
        model = Net()
        Trainer(model, compression, mode).train(range(4))
        trained.append(flat(model))
    # Not to the bit: Horovod fuses tensors as they arrive, and adds them up accordingly.
    np.testing.assert_allclose(*trained, rtol=1e-5, atol=1e-6)


def test_the_average_is_that_of_all_ranks_entries(mode):
    variable = tf.Variable(tf.zeros([64, 64]))
    compressor = DLSCompressor(density=0.25, **SPARSE)
    out = reduced([variable], [whole_numbers((64, 64), 0)], compressor, mode)[0]
    expected = np.zeros(64 * 64)
    for rank in range(hvd.size()):
        mine = whole_numbers((64 * 64,), 0, rank)
        order = np.argsort(-np.abs(mine), kind="stable")[: 64 * 64 // 4]
        expected[order] += mine[order]
    np.testing.assert_allclose(out.numpy().ravel(), expected / hvd.size(), rtol=1e-6)
