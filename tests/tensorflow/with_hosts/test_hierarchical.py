"""Ranks that average their gradients with those of their host, on two hosts: 2 + 2 ranks, 1 + 2."""

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
    held,
    reduced,
    whole_numbers,
)

HOSTS = {3: (1, 2), 4: (2, 2)}  # by number of ranks
HIERARCHICAL = {**SPARSE, "hierarchical": True}
OWNERS = {"exchange": "sparse_allreduce"}  # that add up, between hosts


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("eager", {"adam": (0.5, 0.999)}),
        ("tf.function", {"momentum": 0.9}),
        ("tf.function", {"warmup_steps": 3, "dense_steps": 2}),
        ("tf.function", {"dense_steps": 1, "bucket_bytes": 4000} | OWNERS),
    ],
    ids=str,
)
def test_parameters_and_ratios_agree_to_the_bit(mode, options):
    model = Net()
    compression = DLSCompressor(density=0.05, **HIERARCHICAL, **options)
    Trainer(model, compression, mode).train(range(8))
    record = compression.last_step()
    assert record.step == 8
    assert compression._bindings[0].session.groups.sizes == HOSTS[hvd.size()]
    assert_same_on_all_ranks(record.k)
    assert_same_on_all_ranks(flat(model))
    assert np.isfinite(flat(model)).all()


@pytest.mark.parametrize(
    ("mode", "dtype", "options"),
    [
        ("tf.function", "float32", {}),
        ("eager", "float64", {}),
        ("tf.function", "float32", OWNERS | {"bucket_bytes": 3000}),
    ],
)
def test_nothing_is_lost(mode, dtype, options):
    """What all ranks received plus what hosts keep is what all gradients came to."""
    shapes = [(30, 40), (3, 3, 4, 8), (7, 11)]
    variables = [tf.Variable(tf.zeros(shape, dtype)) for shape in shapes]
    compression = DLSCompressor(variables, density=0.05, **HIERARCHICAL, **options)
    received = [np.zeros(shape) for shape in shapes]
    for step in range(6):
        gradients = [whole_numbers(shape, step) for shape in shapes]
        out = reduced(variables, gradients, compression, mode, op=hvd.Sum)
        for total, gradient in zip(received, out, strict=True):
            total += gradient.numpy()
    session = compression._bindings[0].session
    names = [layer.name for layer in session.plan.sparse]
    for i, name in enumerate(names):
        own = held(compression).get(name, np.zeros(received[i].size, dtype))
        kept = hvd.allreduce(tf.constant(own), op=hvd.Sum, name=f"kept.{i}").numpy()
        kept = kept.reshape(shapes[i]) * hvd.size() / 2
        accumulated = sum(
            whole_numbers(shapes[i], step, rank) for step in range(6) for rank in range(hvd.size())
        )
        assert np.abs(kept).sum() > 0
        if hvd.size() == 4:
            assert np.array_equal(received[i] + kept, accumulated)
        else:  # thirds are rounded
            np.testing.assert_allclose(received[i] + kept, accumulated, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("mode", "horovod_options"),
    [("tf.function", {"op": hvd.Average}), ("eager", {"gradient_predivide_factor": 1.5})],
    ids=str,
)
def test_at_density_one_training_equals_dense_training(mode, horovod_options):
    trained = []
    for compression in (hvd.Compression.none, DLSCompressor(density=1, **HIERARCHICAL)):
        model = Net()
        Trainer(model, compression, mode, lr=0.01, **horovod_options).train(range(6))
        trained.append(flat(model))
    assert_same_on_all_ranks(trained[1])
    np.testing.assert_allclose(trained[1], trained[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("mode", "culprit", "options"),
    [("eager", 0, {}), ("tf.function", 2, {}), ("tf.function", 1, OWNERS)],
)
def test_nan_on_one_rank_refuses_the_step_on_all(mode, culprit, options):
    variables = [tf.Variable(tf.zeros([40, 50])), tf.Variable(tf.zeros([30]))]
    compression = DLSCompressor(variables, density=0.05, **HIERARCHICAL, **options)
    good = [whole_numbers([40, 50], 0), whole_numbers([30], 0)]
    reduced(variables, good, compression, mode)
    bad = [gradient.copy() for gradient in good]
    if hvd.rank() == culprit:
        bad[0][3, 3] = np.nan
    with pytest.raises(Exception, match=r"NaN or Inf.* on the host of rank \d"):
        reduced(variables, bad, compression, mode)
    out = reduced(variables, good, compression, mode)
    assert compression.last_step().step == 2
    assert_same_on_all_ranks(np.concatenate([o.numpy().ravel() for o in out]))


@pytest.mark.parametrize("options", [{}, OWNERS], ids=str)
def test_fit_of_keras_3(options):
    import keras

    import hvd_dls.keras
    from tests.keras.with_ranks.training import data, net
    from tests.keras.with_ranks.training import flat as weights

    model = net(keras)
    compression = DLSCompressor(density=0.05, **HIERARCHICAL, **options)
    optimizer = keras.optimizers.SGD(0.05, momentum=0.9)
    optimizer = hvd_dls.keras.DistributedOptimizer(optimizer, compression=compression)
    model.compile(optimizer, "sparse_categorical_crossentropy")
    model.fit(*data(40), 16, epochs=3, verbose=0)
    assert compression.last_step().step == 9
    assert compression._bindings[0].session.groups.sizes == HOSTS[hvd.size()]
    assert_same_on_all_ranks(weights(model))
