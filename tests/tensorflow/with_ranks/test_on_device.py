"""Layers whose passes stay on a device, in real jobs: CPU tensors made to, and a GPU's."""

from itertools import cycle

import horovod.tensorflow as hvd
import numpy as np
import pytest
import tensorflow as tf

from hvd_dls.core.session.baselines import BASELINES
from hvd_dls.tensorflow import DLSCompressor, binding
from hvd_dls.tensorflow.on_device import Device
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


def all_of_them(variable):
    return True


def some_of_them(variable):
    return variable.shape[0] % 3 == 2


def none_of_them(variable):
    return False


@pytest.fixture
def backend(monkeypatch):
    """Chooses which variables' passes stay on the device."""
    return lambda chosen: monkeypatch.setattr(binding, "stays_on_device", chosen)


def places_of(compression):
    (bound,) = compression._bindings
    return bound.session._backends


OPTIONS = [
    (all_of_them, {}),
    (some_of_them, {"values": "bfloat16", "index_code": "plain", "bucket_bytes": 2000}),
    (all_of_them, {"momentum": 0.5, "nesterov": True, "clip_value": 0.05, "warmup_steps": 3}),
    (all_of_them, {"clip_norm": 0.1, "strategy": "layerwise"}),
    (some_of_them, {"prior": "measured", "dense_steps": 2, "measure_every": 2}),
    (all_of_them, {"strategy": "global", "momentum": 0.5}),
]


@pytest.mark.parametrize(
    ("mode", "there", "options"),
    [(mode, *case) for mode, case in zip(cycle(["tf.function", "eager"]), OPTIONS)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_training_is_the_same_to_the_bit_wherever_the_passes_are(mode, there, options, backend):
    trained = []
    for chosen in (none_of_them, there):
        backend(chosen)
        model, compression = Net(), DLSCompressor(**{"density": 0.05} | SPARSE | options)
        trainer = Trainer(model, compression, mode)
        trainer.train(range(5))
        trained.append(flat(model))
        assert_same_on_all_ranks(trained[-1])
        kinds = {type(p) for p in places_of(compression).values()}
        on_host = options.get("strategy") in BASELINES or chosen is none_of_them
        assert (Device in kinds) == (not on_host)
        assert len(kinds) == 1 + (chosen is some_of_them and not on_host)
        assert np.isfinite(compression.last_step().thresholds).all()
        assert trainer.traces == (1 if mode == "tf.function" else 5)
    if "clip_norm" in options:  # norms are summed up in another order
        np.testing.assert_allclose(trained[0], trained[1], rtol=1e-5, atol=1e-6)
    else:
        assert np.array_equal(trained[0], trained[1])


@pytest.mark.parametrize(
    ("mode", "dtype", "options"),
    [
        ("eager", "float16", {}),
        ("tf.function", "bfloat16", {"momentum": 0.5, "dense_steps": 2}),
        ("eager", "float64", {}),
    ],
    ids=str,
)
def test_other_types_and_groups(mode, dtype, options, backend):
    trained = []
    for chosen in (none_of_them, all_of_them):
        backend(chosen)
        model, compression = Net(dtype), DLSCompressor(density=0.05, **SPARSE, **options)
        Trainer(model, compression, mode, groups=2).train(range(4))
        trained.append(flat(model))
        assert_same_on_all_ranks(trained[-1])
    assert np.array_equal(*trained)


@pytest.mark.parametrize(
    ("mode", "dtype", "values"),
    [
        ("tf.function", "float16", "float16"),
        ("eager", "bfloat16", "float32"),
        ("eager", "float32", "float16"),
        ("tf.function", "float64", "float32"),
    ],
)
def test_what_was_sent_and_the_residuals_are_all_that_was_accumulated(mode, dtype, values, backend):
    backend(all_of_them)
    shapes = [(30, 40), (3, 3, 4, 8), (7, 11)]
    variables = [tf.Variable(tf.zeros(shape, dtype)) for shape in shapes]
    compression = DLSCompressor(variables, density=0.1, values=values, **SPARSE)
    received = [np.zeros(shape) for shape in shapes]
    accumulated = [np.zeros(shape) for shape in shapes]

    def small(shape, step, rank=None):
        """Sums stay below 256, up to which bfloat16 holds every whole number."""
        return np.rint(whole_numbers(shape, step, rank) / 16)

    for step in range(6):
        gradients = [small(shape, step) for shape in shapes]
        out = reduced(variables, gradients, compression, mode, op=hvd.Sum)
        for i, shape in enumerate(shapes):
            received[i] += tf.cast(out[i], tf.float64).numpy()
            accumulated[i] += sum(small(shape, step, rank) for rank in range(hvd.size()))
    (state,) = compression.state_dict()["models"]
    for i, residual in enumerate(state["residuals"].values()):
        kept = hvd.allreduce(tf.constant(residual), op=hvd.Sum, name=f"kept.{i}").numpy()
        assert np.abs(kept).sum() > 0
        assert np.array_equal(received[i] + kept.reshape(shapes[i]), accumulated[i])


@pytest.mark.parametrize(
    ("mode", "of", "to"),
    [("eager", all_of_them, none_of_them), ("tf.function", none_of_them, all_of_them)],
)
def test_a_restart_goes_on_bit_for_bit_on_the_device_or_off_it(mode, of, to, backend):
    """A saved state is of NumPy arrays, wherever residuals and velocities were."""

    def start():
        model, compression = Net(), DLSCompressor(density=0.05, momentum=0.5, **SPARSE)
        return model, compression, Trainer(model, compression, mode)

    backend(of)
    model, compression, trainer = start()
    trainer.train(range(4))
    weights = [p.numpy() for p in model.parameters]
    saved = compression.state_dict()
    (state,) = saved["models"]
    for part in ("residuals", "velocities"):
        assert {type(array) for array in state[part].values()} == {np.ndarray}
        state[part] = {name: array.copy() for name, array in state[part].items()}
    trainer.train(range(4, 8))

    backend(to)
    again, compression, trainer = start()
    for variable, value in zip(again.parameters, weights, strict=True):
        variable.assign(value)
    compression.load_state_dict(saved)
    trainer.train(range(4, 8))
    assert np.array_equal(flat(model), flat(again))


NAN_SHAPES = {"first": (30, 20), "vector": (7,), "second": (20, 30)}


@pytest.mark.parametrize(
    ("mode", "nonfinite", "dense_steps", "where"),
    [("eager", "skip", 3, "first"), ("eager", "skip", 3, "vector"), ("eager", "raise", 0, "second"),
     ("eager", "raise", 0, "vector"), ("tf.function", "skip", 0, "second"),
     ("tf.function", "skip", 0, "vector"), ("tf.function", "raise", 3, "first"),
     ("tf.function", "raise", 3, "vector")],
)  # fmt: skip
def test_nan_on_one_rank(mode, where, nonfinite, dense_steps, backend):
    backend(all_of_them)
    variables = [tf.Variable(tf.zeros(shape), name=name) for name, shape in NAN_SHAPES.items()]
    compression = DLSCompressor(
        density=0.1, momentum=0.5, nonfinite=nonfinite, dense_steps=dense_steps, **SPARSE
    )

    def step(number, bad=None):
        gradients = [whole_numbers(shape, number) for shape in NAN_SHAPES.values()]
        if bad is not None and hvd.rank() == hvd.size() - 1:
            gradients[list(NAN_SHAPES).index(bad)].reshape(-1)[3] = np.nan
        return reduced(variables, gradients, compression, mode)

    def everything():
        (model,) = compression.state_dict()["models"]
        arrays = [*model["residuals"].values(), *model["velocities"].values(), model["ratios"]]
        return b"".join(array.tobytes() for array in arrays)

    step(0)
    before = everything()
    if nonfinite == "raise":
        with pytest.raises(tf.errors.OpError, match="NaN or Inf"):
            step(1, where)
    else:
        out = dict(zip(NAN_SHAPES, step(1, where), strict=True))
        if dense_steps:  # what has come back before may have been good
            out = {where: out[where]}
        assert all(np.all(gradient == 0) for gradient in out.values())
    assert everything() == before
    assert all(np.isfinite(out).all() for out in step(2))
    assert everything() != before
    assert compression.last_step().step == 2


def test_residuals_follow_the_loss_scale(mode, backend):
    """Sums are what they are without scaling and on the host, to the bit."""
    variables = [tf.Variable(tf.zeros((30, 20)), name="layer")]
    scale = [1024.0]
    backend(none_of_them)
    plain = DLSCompressor(variables, density=0.1, momentum=0.5, **SPARSE)
    reduced(variables, [whole_numbers((30, 20), 0)], plain, mode)
    backend(all_of_them)
    followed = DLSCompressor(
        variables, density=0.1, momentum=0.5, loss_scale=lambda: scale[0], **SPARSE
    )
    reduced(variables, [whole_numbers((30, 20), 0) * scale[0]], followed, mode)
    for step in range(1, 6):
        scale[0] *= 2.0 if step % 2 else 0.25
        gradient = whole_numbers((30, 20), step)
        (expected,) = reduced(variables, [gradient], plain, mode)
        (out,) = reduced(variables, [gradient * scale[0]], followed, mode)
        np.testing.assert_array_equal(out / scale[0], expected)


# Variables on another device than the first CPU --------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "chosen"),
    [("eager", all_of_them), ("tf.function", all_of_them), ("tf.function", some_of_them),
     ("eager", none_of_them)],
)  # fmt: skip
def test_a_model_on_several_devices(mode, chosen, backend):
    """The first half on one, the rest on another; with passes there, or on the host."""
    backend(none_of_them)
    trained = []
    for second in ("CPU:0", "CPU:1"):
        model, compression = Net(), DLSCompressor(density=0.05, momentum=0.5, **SPARSE)
        with tf.device(second):
            moved = [tf.Variable(p, name=p.name[:-2]) for p in model.parameters[3:]]
        model.parameters = [*model.parameters[:3], *moved]
        Trainer(model, compression, mode).train(range(4))
        trained.append(flat(model))
        backend(chosen)
    assert np.array_equal(*trained)


def test_what_runs_where(backend):
    """What is as long as a gradient never leaves its device."""
    backend(some_of_them)
    with tf.device("CPU:1"):
        there = tf.Variable(tf.zeros((32, 20)), name="there")
    here = tf.Variable(tf.zeros((30, 20)), name="here")
    compression = DLSCompressor([there, here], density=0.1, momentum=0.5, **SPARSE)

    @tf.function
    def step(*gradients):
        return reduced([there, here], gradients, compression, "plain")

    graph = step.get_concrete_function(*[tf.TensorSpec(v.shape) for v in (there, here)]).graph
    long = {there.shape.num_elements(), here.shape.num_elements()}
    calls = [
        (op.type, op.device[-5:], name)
        for op in graph.get_operations()
        if op.type in ("PyFunc", "EagerPyFunc")
        for tensor in (*op.inputs, *op.outputs)
        if tensor.shape.rank and tensor.shape.num_elements() in long
        for name, rows in (("there", 32), ("here", 30))
        if tensor.shape[0] == rows
    ]
    assert {call for call in calls if call[2] == "there"} == {("EagerPyFunc", "CPU:1", "there")}
    assert {call for call in calls if call[2] == "here"} == {("PyFunc", "CPU:0", "here")}


def test_variables_of_another_model_are_refused_wherever_they_are(backend):
    backend(all_of_them)
    with tf.device("CPU:1"):
        models = [Net(), Net()]
    compression = DLSCompressor(density=0.05, **SPARSE)
    Trainer(models[0], compression, "eager").train(range(2))
    with pytest.raises(tf.errors.OpError, match="other variables of the same shapes"):
        Trainer(models[1], compression, "eager").train(range(1))


GPUS = tf.config.list_physical_devices("GPU")


@pytest.mark.skipif(not GPUS, reason="no GPU: TensorFlow lists none")
@pytest.mark.parametrize("options", [{}, {"momentum": 0.5}, {"strategy": "norm"}], ids=str)
def test_training_on_a_gpu(mode, options):
    """All layers are compressed: Horovod may be built without CUDA, and then takes no others."""
    device = f"GPU:{hvd.rank() % len(GPUS)}"
    generator = np.random.default_rng(1)
    with tf.device(device):
        weights = [
            tf.Variable(generator.normal(size=shape) * 0.2, dtype=tf.float32)
            for shape in [(48, 64), (64, 5)]
        ]
    compression = DLSCompressor(density=0.05, **SPARSE, **options)

    def step(images, labels):
        with tf.GradientTape() as tape:
            hidden = tf.nn.relu(tf.reshape(images, [-1, 48]) @ weights[0])
            loss = cross_entropy(hidden @ weights[1], labels)
        tape = hvd.DistributedGradientTape(tape, compression=compression)
        gradients = tape.gradient(loss, weights)
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.assign_sub(0.05 * gradient)

    step = tf.function(step) if mode == "tf.function" else step
    before = flat(weights)
    for number in range(8):
        step(*batch(number))
    on_host = options.get("strategy") in BASELINES
    assert all((type(p) is Device) == (not on_host) for p in places_of(compression).values())
    assert compression.last_step().step == 8
    assert not np.array_equal(before, flat(weights))
    assert np.isfinite(flat(weights)).all()
    assert_same_on_all_ranks(flat(weights))
