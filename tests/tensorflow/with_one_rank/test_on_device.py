"""The passes in TensorFlow beside the core's, to the bit: on CPU tensors, and on a GPU if any.

Without subnormal numbers: on a CPU, most operations of TensorFlow take them for zero.
"""

import math

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hvd_dls.config import DLSConfig
from hvd_dls.core.balancing.sketch import SAMPLE, WINDOW, histogram
from hvd_dls.core.selection import adam, momentum, passes
from hvd_dls.core.selection.norms import Norm, l2_norm
from hvd_dls.tensorflow.on_device import Device
from tests.core.backends import SHAPES, Framework, check_sessions, each_dtype, each_option
from tests.core.selection.test_passes import DTYPES, cases, entries, load, store
from tests.core.strategies import KINDS

no_gpu = pytest.mark.skipif(
    not tf.config.list_physical_devices("GPU"), reason="no GPU: TensorFlow lists none"
)
on_each_device = pytest.mark.parametrize("name", ["CPU:0", pytest.param("GPU:0", marks=no_gpu)])

some = settings(
    derandomize=True, deadline=None, max_examples=60, suppress_health_check=list(HealthCheck)
)


def tensor(array, name="CPU:0"):
    """A copy of an array of the core's on a device; uint16 is bfloat16."""
    kind = tf.bfloat16.as_numpy_dtype if array.dtype == np.uint16 else array.dtype
    with tf.device(name):
        return tf.constant(array.view(kind).copy())


def variable(array, name="CPU:0"):
    """The same, to be changed."""
    with tf.device(name):
        return tf.Variable(tensor(array, name))


def array_of(values):
    """A copy of a tensor or variable as the core has it."""
    array = np.array(values.numpy())
    return array.view(np.uint16) if array.dtype == tf.bfloat16.as_numpy_dtype else array


def bits(values):
    return (values if isinstance(values, np.ndarray) else array_of(values)).tobytes()


def normal(values):
    """Zeros for what would be subnormal in float32 (or bfloat16), as TensorFlow has it."""
    if values.dtype == np.float16:
        return values
    tiny = np.abs(load(values)) < np.finfo(np.float32).tiny
    values = values.copy()
    if values.dtype == np.uint16:
        values[tiny] &= 0x8000
    else:
        values[tiny] = np.copysign(values.dtype.type(0), values[tiny])
    return values


def assert_same(own, core):
    """Bit for bit; but for subnormal numbers and what they are rounded to."""
    least = np.finfo(np.float32).tiny  # to which a subnormal number may be rounded up, of 16 bits
    magnitudes = np.abs(load(core))
    tiny = (magnitudes > 0) & (magnitudes <= least) & (core.dtype != np.float16)
    assert (np.abs(load(own))[tiny] <= least).all()
    own, core = own.copy(), core.copy()
    own[tiny] = core[tiny] = 0
    assert bits(own) == bits(core)


# Find -------------------------------------------------------------------------------------------


def check_find(residual, gradient, k, name):
    """Ties go to the lower index, too."""
    residual, gradient = normal(residual), normal(gradient)
    there = [variable(residual, name), tensor(gradient, name)]
    found = Device(name).find(*there, k).result()
    assert [bits(x) for x in there] == [bits(residual), bits(gradient)]
    expected = passes.find(residual, gradient, k)
    if expected is None:
        assert found is None
        return
    assert type(found.threshold) is float
    assert found.threshold == expected.threshold
    assert (found.indices.dtype, found.values.dtype) == (np.uint32, residual.dtype)
    assert bits(found.indices) == bits(expected.indices)
    assert np.array_equal(found.values, expected.values)  # a zero's sign is not sent
    assert found.sketch.base == expected.sketch.base
    assert bits(found.sketch.counts) == bits(expected.sketch.counts)


@on_each_device
@some
@given(case=cases())
def test_what_is_found_is_what_the_core_finds(name, case):
    check_find(*case, name)


@on_each_device
@pytest.mark.parametrize("n", [SAMPLE, 2 * SAMPLE + 1, 5 * SAMPLE + 7])
@pytest.mark.parametrize("kind", ["gaussian", "ties", "octaves"])
def test_sketches_of_large_layers(name, kind, n):
    gradient = KINDS[kind](np.random.default_rng(2), n).astype(np.float32)
    for k in (10, n // 100, n // 2):
        check_find(np.roll(gradient, 5), gradient, k, name)


@on_each_device
@pytest.mark.parametrize(("work", "dtype"), DTYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_are_found_wherever_they_are(name, work, dtype, bad):
    for where in (0, 1000, 5002):
        for k in (1, 10, 5003):
            gradient = store(np.ones(5003), dtype)
            gradient[where] = store([bad], dtype)[0]
            check_find(np.ones(5003, work), gradient, k, name)


@on_each_device
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_ends_of_the_range(name, dtype):
    """Overflow of a sum; sketches whose window ends with the last bin, or begins with the first."""
    largest, tiny = np.finfo(dtype).max, np.finfo(np.float32).tiny
    for value in (largest, largest / 2, largest / 1000, 2e6 * tiny, 1e7 * tiny, 0):
        gradient = (value * np.geomspace(1, 1e-6, 100)).astype(dtype)
        for residual in (np.zeros(100, dtype), gradient):
            check_find(residual, gradient, 5, name)


@pytest.mark.parametrize("dtype", [tf.float16, tf.bfloat16, tf.float32, tf.float64])
def test_shapes_never_depend_on_data(dtype):
    """While a function is traced, tensors have no values: to look at some is an error."""
    backend = Device("CPU:0")
    work = tf.float64 if dtype == tf.float64 else tf.float32
    residual, gradient = (tf.TensorSpec([100_000], kind) for kind in (work, dtype))
    traced = tf.function(lambda r, g: backend.find(r, g, 1000).parts, autograph=False)
    parts = traced.get_concrete_function(residual, gradient).structured_outputs
    assert [tuple(part.shape) for part in parts] == [(1000,), (1000,), (WINDOW,)]
    assert [part.dtype for part in parts] == backend.parts(work.as_numpy_dtype)


def test_what_is_on_its_way_is_ready_when_it_has_been_brought():
    gradient = np.arange(100, dtype=np.float32)
    later = Device("CPU:0").find(variable(0 * gradient), tensor(gradient), 3)
    assert not later.ready()
    later.parts = [part.numpy() for part in later.parts]
    assert later.ready()
    assert later.result().indices.tolist() == [97, 98, 99]


# Settle -----------------------------------------------------------------------------------------


@on_each_device
@some
@given(
    case=cases(sizes=(1, 2, 65, 1000, 20_001)),
    data=st.data(),
    ranks=st.integers(0, 5),
    scale=st.sampled_from([1.0, 0.25, 1 / 3, -2.0, 0.0, -0.0, 1e-30, 1e30]),
)
def test_settling_gives_the_core_s_bits(name, case, data, ranks, scale):
    residual, gradient = map(normal, case[:2])
    work, backend = residual.dtype, Device(name)

    def drawn():
        indices, values = data.draw(entries(len(residual), work))
        return indices, normal(values)

    received = [drawn() for _ in range(ranks)]
    indices, kept = drawn()
    kept = data.draw(st.sampled_from([None, kept]))
    other = [np.float32, np.float16, np.uint16] if work == np.float32 else [np.float64, np.float32]
    for dtype in {gradient.dtype, np.dtype(data.draw(st.sampled_from(other)))}:
        core_residual, core_out = residual.copy(), np.zeros(len(residual), dtype)
        own, new, out = (variable(x, name) for x in (residual, gradient, core_out))
        passes.settle(core_residual, gradient, indices, kept, received, scale, core_out)
        there = tf.constant(np.array(scale))  # not a bare -0.0: for that TensorFlow makes 0.0
        backend.settle(own, new, indices, kept, received, there, out)
        assert_same(array_of(own), core_residual)
        assert_same(array_of(out), core_out)
        assert bits(new) == bits(gradient)


@on_each_device
@pytest.mark.parametrize("dtype", [np.float16, np.uint16])
def test_sums_are_rounded_as_the_core_rounds(name, dtype):
    """To each number of 16 bits, subnormal float16 too; at and above the middle between two."""
    numbers = load(np.arange(0x8000, dtype=np.uint16).view(dtype))
    numbers = numbers[np.isfinite(numbers)].astype(np.float32)
    middles = numbers[1:] / 2 + numbers[:-1] / 2
    values = np.concatenate([numbers, middles, np.nextafter(middles, np.float32(np.inf)), -middles])
    values = normal(values)
    where, zeros = np.arange(len(values), dtype=np.uint32), np.zeros_like(values)
    core, own = np.empty(len(values), dtype), variable(np.zeros(len(values), dtype), name)
    received = [(where, values)]
    passes.settle(zeros.copy(), zeros, where[:0], None, received, 1.0, core)
    there = tensor(zeros, name)
    Device(name).settle(variable(zeros, name), there, where[:0], None, received, 1.0, own)
    assert bits(own) == bits(core)


# The smaller ones -------------------------------------------------------------------------------


CLIPPING = [{"clip_value": 0.5}, {"clip_norm": 2.0}, {"clip_norm": 2.0, "clip_value": 0.5}]


@on_each_device
@pytest.mark.parametrize(("work", "dtype"), DTYPES)
@pytest.mark.parametrize("options", [{}, *CLIPPING, {"clip_norm": 1e9}], ids=str)
@pytest.mark.parametrize("mass", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}])
def test_clipping_and_momentum_are_the_core_s(name, work, dtype, options, mass):
    config, backend = DLSConfig(**options, **mass), Device(name)
    rng = np.random.default_rng(0)
    velocity = rng.standard_normal(3000).astype(work) if mass else None
    for factor in (1, 0, 1e-3, 1e3):
        gradient = store(factor * rng.standard_normal(3000), dtype)
        into = np.zeros(3000, work)
        there = variable(into, name)
        expected = momentum.correct(gradient, velocity, into, config, 2.0)
        of = None if velocity is None else variable(velocity, name)
        given_gradient = tensor(gradient, name)
        result = backend.correct(given_gradient, of, there, config, 2.0)
        assert bits(given_gradient) == bits(gradient)
        for own, core in ((result, expected), (there, into)):
            if options.get("clip_norm") == 2.0:
                np.testing.assert_allclose(array_of(own), core, rtol=1e-6)
            else:
                assert bits(own) == bits(core)


@on_each_device
@pytest.mark.parametrize(("work", "dtype"), DTYPES)
@pytest.mark.parametrize("options", [{}, {"clip_value": 0.5}, {"clip_norm": 2.0}], ids=str)
def test_adam_s_updates_are_the_core_s(name, work, dtype, options):
    """Up to rounding: roots are not the same to the bit everywhere."""
    config, backend = DLSConfig(adam=(0.5, 0.999), **options), Device(name)
    rng, weights = np.random.default_rng(0), adam.Weights()
    own = adam.Moments(np.zeros(3000, work), np.zeros(3000, work))
    there = adam.Moments(*(variable(array, name) for array in own))
    for factor in (1, 1e-3, 0, 1e3):
        gradient = store(factor * rng.standard_normal(3000), dtype)
        gradient[7] = store(np.array([np.nan if factor == 1e3 else 1.0]), dtype)[0]
        weights = weights.with_one_more(config.adam)
        by = adam.factors_of(config, weights, 2.0, np.dtype(work))
        then, update = adam.Moments(*(np.empty(3000, work) for _ in own)), np.empty(3000, work)
        adam.update_of(gradient, own, then, update, by, config, 2.0)
        after = adam.Moments(*(variable(np.zeros(3000, work), name) for _ in own))
        result, given_gradient = variable(np.zeros(3000, work), name), tensor(gradient, name)
        backend.update(given_gradient, there, after, result, by, config, 2.0)
        assert bits(given_gradient) == bits(gradient)
        if factor == 1e3:  # NaN, to be found later
            assert np.isnan(update).any()
            assert np.isnan(array_of(result)).any()
            continue
        for device_s, core_s in ((result, update), *zip(after, then, strict=True)):
            np.testing.assert_allclose(array_of(device_s), core_s, rtol=1e-5, atol=1e-30)
        own, there = then, after


@on_each_device
@pytest.mark.parametrize(("work", "dtype"), DTYPES)
@pytest.mark.parametrize("value", [None, 0.5])
def test_a_norm_that_is_known_is_the_core_s_and_gradients_are_scaled_to_its_limit(
    name, work, dtype, value
):
    config, backend = DLSConfig(clip_value=value), Device(name)
    rng = np.random.default_rng(0)
    for factor in (1e-3, 1, 1e3):
        gradient = store(factor * rng.standard_normal(3000), dtype)
        there = tensor(gradient, name)
        norm, expected = backend.norm(there, value), l2_norm(gradient, value)
        assert float(norm) == pytest.approx(expected, rel=1e-6)
        into, limit = variable(np.zeros(3000, work), name), 2.0
        result = backend.correct(there, None, into, config, 1.0, Norm(norm, limit))
        core = np.empty(3000, work)
        momentum.correct(gradient, None, core, config, 1.0, Norm(expected, limit))
        np.testing.assert_allclose(array_of(result), core, rtol=1e-6)
    for bad in (np.nan, np.inf):
        gradient[7] = store(np.array([bad]), dtype)[0]
        assert not math.isfinite(float(backend.norm(tensor(gradient, name), value)))


@on_each_device
@pytest.mark.parametrize("options", [*CLIPPING, {"momentum": 0.5, "nesterov": True}], ids=str)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_clipping_leaves_nan_and_inf_to_be_found(name, options, bad):
    gradient = np.ones(1000, np.float32)
    gradient[77] = bad
    velocity, into = variable(np.ones_like(gradient), name), variable(np.ones_like(gradient), name)
    backend, config = Device(name), DLSConfig(**options)
    of = velocity if config.momentum else None
    corrected = backend.correct(tensor(gradient, name), of, into, config, 1.0)
    assert not backend.finite(corrected)
    assert backend.find(variable(np.zeros_like(gradient), name), corrected, 3).result() is None


def test_a_layer_without_entries_can_be_clipped():
    nothing = np.zeros(0, np.float32)
    config = DLSConfig(clip_norm=1.0, clip_value=1.0)
    assert Device("CPU:0").correct(tensor(nothing), None, variable(nothing), config).shape == (0,)


@on_each_device
def test_histograms_zeros_and_what_was_saved(name):
    backend, rng = Device(name), np.random.default_rng(0)
    values = (rng.standard_normal(5000) ** 9).astype(np.float32)
    values[:10] = -0.0
    assert np.array_equal(backend.histogram(tensor(values, name)), histogram(values))
    own = backend.zeros(5000, np.dtype(np.float32))
    assert own.device.endswith(name)
    assert (own.shape, own.dtype) == ((5000,), tf.float32)
    saved = values.copy()
    backend.load(own, saved)
    assert bits(backend.to_host(own)) == bits(values)
    backend.clear(own, np.array([3, 4999], np.uint32))
    assert np.flatnonzero(backend.to_host(own) != values).tolist() == [4999]
    assert bits(saved) == bits(values)  # memory of its own
    before = backend.copy(own)
    backend.scale(own, 2.0)
    assert np.array_equal(own, 2 * before)
    backend.add(own, before)
    assert np.array_equal(own, 3 * before)
    backend.fill(own, 0.0)
    assert not backend.to_host(own).any()
    backend.fill(own, np.inf)
    assert np.isposinf(backend.to_host(own)).all()
    assert backend.finite(before)
    assert not backend.finite(own)


# Sessions -----------------------------------------------------------------------------------------


TENSORFLOW = Framework(
    "tensorflow",
    tensor,
    array_of,
    floats=lambda values: tf.cast(values, tf.float32) if values.dtype == tf.bfloat16 else values,
    writable=tf.Variable,
)


@on_each_device
@each_option
@each_dtype
@pytest.mark.parametrize("mixed", [False, True])
def test_a_session_on_a_device_is_one_on_the_host_to_the_bit(name, options, dtype, mixed):
    layers = [n for n in SHAPES["tensorflow"] if not mixed or n in ("bias", "hidden")]
    check_sessions(TENSORFLOW, name, Device(name), layers, dtype, options)
