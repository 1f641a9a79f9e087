"""What stands around the selection: momentum, dense steps, strategies, skipped steps."""

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

modes = pytest.mark.parametrize("mode", ["eager", "tf.function"])
traced = pytest.mark.parametrize("mode", ["tf.function"])


@traced
@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.9, "warmup_steps": 4, "dense_steps": 2},
        {"clip_norm": 0.1, "clip_value": 0.01, "clip_global_norm": 0.5},
        {"adam": (0.5, 0.999), "warmup_steps": 2, "dense_steps": 2},
        {"strategy": "global"},
        {"strategy": "norm"},
        {"strategy": "hard", "threshold": 1e-3},
        {"layer_density": {"conv*": 0.5, "hidden": "dense"}},
        {"prior": "measured"},
    ],
    ids=str,
)
def test_ranks_agree_and_learn_without_new_traces(mode, options):
    model, compression = Net(), DLSCompressor(**{"density": 0.1} | SPARSE | options)
    trainer = Trainer(model, compression, mode)
    before = flat(model)
    trainer.train(range(8))
    assert compression.last_step().step == 8
    assert_same_on_all_ranks(flat(model))
    assert not np.array_equal(before, flat(model))
    assert np.isfinite(flat(model)).all()
    assert trainer.traces == (1 if mode == "tf.function" else 8)


@traced
@pytest.mark.parametrize(
    ("dtype", "nesterov"),
    [("float32", False), ("float32", True), ("float16", False), ("bfloat16", True)],
)
def test_momentum_at_density_one_is_momentum_of_the_average(mode, dtype, nesterov):
    """Without masking; of layers that are compressed and of others, behind dense steps too."""
    shapes = {"compressed": (30, 20), "vector": (7,)}
    variables = [tf.Variable(tf.zeros(s, dtype), name=name) for name, s in shapes.items()]
    compression = DLSCompressor(
        density=1.0,
        momentum=0.5,
        nesterov=nesterov,
        momentum_masking=False,
        dense_steps=2,
        **SPARSE,
    )
    velocities = [np.zeros(v.shape) for v in variables]
    for step in range(5):
        own = [np.rint(whole_numbers(v.shape, step) / 16) for v in variables]
        out = reduced(variables, own, compression, mode)
        for i, variable in enumerate(variables):
            of_all = [
                np.rint(whole_numbers(variable.shape, step, r) / 16) for r in range(hvd.size())
            ]
            average = sum(of_all) / hvd.size()
            velocities[i] = 0.5 * velocities[i] + average
            expected = average + 0.5 * velocities[i] if nesterov else velocities[i]
            assert out[i].dtype == dtype
            exact = dtype == "float32"
            np.testing.assert_allclose(
                tf.cast(out[i], tf.float32), expected, atol=0 if exact else 0.05, rtol=0
            )


@modes
def test_dense_steps_send_whole_gradients(mode):
    variable = tf.Variable(tf.zeros((40, 30)), name="layer")
    compression = DLSCompressor(density=0.1, dense_steps=2, **SPARSE)
    for step in range(4):
        (out,) = reduced([variable], [whole_numbers((40, 30), step)], compression, mode)
        of_all = [whole_numbers((40, 30), step, rank) for rank in range(hvd.size())]
        assert np.array_equal(out, sum(of_all) / hvd.size()) == (step < 2)
        assert (compression.last_step().sparse_bytes == 0) == (step < 2)


# NaN and Inf ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "bad", "scaled"),
    [("eager", "first", False), ("tf.function", "second", True), ("tf.function", "vector", False),
     ("eager", "vector", True)],
)  # fmt: skip
def test_a_skipped_step_leaves_residuals_alone_and_tells(mode, bad, scaled):
    """By zeros, or by Inf everywhere for an optimizer that looks for it."""
    shapes = {"first": (30, 20), "vector": (7,), "second": (20, 30)}
    variables = [tf.Variable(tf.zeros(s), name=name) for name, s in shapes.items()]
    options = {"loss_scale": lambda: 1.0} if scaled else {"nonfinite": "skip"}
    compression = DLSCompressor(density=0.1, momentum=0.5, **options, **SPARSE)

    def step(number, value=None):
        gradients = [whole_numbers(shape, number) for shape in shapes.values()]
        if value is not None and hvd.rank() == hvd.size() - 1:
            gradients[list(shapes).index(bad)].reshape(-1)[3] = value
        return reduced(variables, gradients, compression, mode)

    def state():
        (model,) = compression.state_dict()["models"]
        arrays = [*model["residuals"].values(), *model["velocities"].values(), model["ratios"]]
        return b"".join(array.tobytes() for array in arrays)

    step(0)
    before = state()
    for number, value in enumerate([np.nan, np.inf], start=1):
        for out in step(number, value):
            assert np.all(out == (np.inf if scaled else 0))
        assert state() == before
    assert all(np.isfinite(out).all() for out in step(3))
    assert state() != before
    assert compression.last_step().step == 2
    assert compression.skipped_steps() == 2


@modes
def test_residuals_follow_a_changing_loss_scale(mode):
    """Sums are what they are without scaling, to the bit."""
    variables = [tf.Variable(tf.zeros((30, 20)), name="layer")]
    scale = [1024.0]
    plain = DLSCompressor(density=0.1, momentum=0.5, **SPARSE)
    followed = DLSCompressor(density=0.1, momentum=0.5, loss_scale=lambda: scale[0], **SPARSE)
    for step in range(6):
        gradient = whole_numbers((30, 20), step)
        (expected,) = reduced(variables, [gradient], plain, mode)
        (out,) = reduced(variables, [gradient * scale[0]], followed, mode)
        np.testing.assert_array_equal(out / scale[0], expected)
        scale[0] *= 2.0 if step % 2 else 0.25
