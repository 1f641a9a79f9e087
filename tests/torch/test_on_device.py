"""The passes in torch beside the core's, to the bit: on CPU tensors, and on a GPU if any."""

import contextlib
import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytest.importorskip("horovod.torch")

from hvd_dls.config import DLSConfig  # noqa: E402
from hvd_dls.core.balancing.sketch import (  # noqa: E402
    SAMPLE,
    WINDOW,
    histogram,
)
from hvd_dls.core.selection import adam, momentum, passes  # noqa: E402
from hvd_dls.core.selection.norms import Norm, l2_norm  # noqa: E402
from hvd_dls.torch import looking, on_device  # noqa: E402
from hvd_dls.torch.on_device import Device, finite_future  # noqa: E402
from tests.core.selection.test_passes import DTYPES, cases, entries, load, plus, store  # noqa: E402
from tests.core.strategies import KINDS  # noqa: E402
from tests.core.taking import sketch  # noqa: E402
from tests.torch.devices import array_of, no_gpu, on_each_device, tensor  # noqa: E402

some = settings(
    derandomize=True, deadline=None, max_examples=60, suppress_health_check=list(HealthCheck)
)


def bits(values):
    return (array_of(values) if isinstance(values, torch.Tensor) else values).tobytes()


# Find -------------------------------------------------------------------------------------------


def check_find(residual, gradient, k, device):
    there = [tensor(residual, device), tensor(gradient, device)]
    found = Device(torch.device(device)).find(*there, k).result()
    assert [bits(x) for x in there] == [bits(residual), bits(gradient)]
    expected = passes.find(residual, gradient, k)
    if expected is None:
        assert found is None
        return
    assert type(found.threshold) is float
    assert found.threshold == expected.threshold
    assert (found.indices.dtype, found.values.dtype) == (np.uint32, residual.dtype)
    assert (np.diff(found.indices.astype(np.int64)) > 0).all()
    total = plus(residual, gradient)
    assert bits(found.values) == bits(total[found.indices])
    own, core = (set(x.indices[np.abs(x.values) > x.threshold]) for x in (found, expected))
    assert own == core
    left = total.copy()
    left[found.indices] = 0
    base, counts = sketch(found.values, left, found.threshold)
    assert found.sketch.base == base
    assert np.array_equal(found.sketch.counts, counts)
    if np.count_nonzero(np.abs(total) == found.threshold) == 1:  # no ties: the very same
        assert bits(found.indices) == bits(expected.indices)
        assert bits(found.sketch.counts) == bits(expected.sketch.counts)


@on_each_device
@some
@given(case=cases())
def test_what_is_found_is_what_the_core_finds_but_for_ties(device, case):
    check_find(*case, device)


@on_each_device
@pytest.mark.parametrize("n", [SAMPLE, 2 * SAMPLE + 1, 5 * SAMPLE + 7])
@pytest.mark.parametrize("kind", ["gaussian", "ties", "octaves"])
def test_sketches_of_large_layers(device, kind, n):
    gradient = KINDS[kind](np.random.default_rng(2), n).astype(np.float32)
    for k in (10, n // 100, n // 2):
        check_find(np.roll(gradient, 5), gradient, k, device)


@on_each_device
@pytest.mark.parametrize(("work", "dtype"), DTYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_are_found_wherever_they_are(device, work, dtype, bad):
    for where in (0, 1000, 5002):
        for k in (1, 10, 5003):
            gradient = store(np.ones(5003), dtype)
            gradient[where] = store([bad], dtype)[0]
            check_find(np.ones(5003, work), gradient, k, device)


@on_each_device
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_ends_of_the_range(device, dtype):
    """Overflow of a sum; sketches whose window ends with the last bin, or begins with the first."""
    largest, tiny = np.finfo(dtype).max, np.finfo(dtype).smallest_subnormal
    for value in (largest, largest / 2, largest / 1000, tiny, 5 * tiny, 0):
        gradient = (value * np.geomspace(1, 1e-6, 100)).astype(dtype)
        for residual in (np.zeros(100, dtype), gradient):
            check_find(residual, gradient, 5, device)


# Settle -----------------------------------------------------------------------------------------


@on_each_device
@some
@given(
    case=cases(sizes=(1, 2, 65, 1000, 20_001)),
    data=st.data(),
    ranks=st.integers(0, 5),
    scale=st.sampled_from([1.0, 0.25, 1 / 3, -2.0, 0.0, -0.0, 1e-40, 1e30]),
)
def test_settling_gives_the_core_s_bits(device, case, data, ranks, scale):
    residual, gradient, _ = case
    work, backend = residual.dtype, Device(torch.device(device))
    received = [data.draw(entries(len(residual), work)) for _ in range(ranks)]
    indices, kept = data.draw(entries(len(residual), work))
    kept = data.draw(st.sampled_from([None, kept]))
    other = [np.float32, np.float16, np.uint16] if work == np.float32 else [np.float64, np.float32]
    for dtype in {gradient.dtype, np.dtype(data.draw(st.sampled_from(other)))}:
        core_residual, core_out = residual.copy(), np.empty(len(residual), dtype)
        passes.settle(core_residual, gradient, indices, kept, received, scale, core_out)
        own, new = tensor(residual, device), tensor(gradient, device)
        out = new if dtype == gradient.dtype else tensor(core_out, device).fill_(77)
        backend.settle(own, new, indices, kept, received, scale, out)
        assert bits(own) == bits(core_residual)
        assert bits(out) == bits(core_out)


@on_each_device
@pytest.mark.parametrize("dtype", [np.float16, np.uint16])
def test_sums_are_rounded_as_the_core_rounds(device, dtype):
    numbers = load(np.arange(0x8000, dtype=np.uint16).view(dtype))
    numbers = numbers[np.isfinite(numbers)].astype(np.float32)
    middles = numbers[1:] / 2 + numbers[:-1] / 2
    values = np.concatenate([numbers, middles, np.nextafter(middles, np.float32(np.inf)), -middles])
    where, zeros = np.arange(len(values), dtype=np.uint32), np.zeros_like(values)
    core, own = np.empty(len(values), dtype), tensor(np.empty(len(values), dtype), device)
    received = [(where, values)]
    passes.settle(zeros.copy(), zeros, where[:0], None, received, 1.0, core)
    there = tensor(zeros, device)
    Device(torch.device(device)).settle(there, there, where[:0], None, received, 1.0, own)
    assert bits(own) == bits(core)


# The smaller ones -------------------------------------------------------------------------------


CLIPPING = [{"clip_value": 0.5}, {"clip_norm": 2.0}, {"clip_norm": 2.0, "clip_value": 0.5}]


@on_each_device
@pytest.mark.parametrize(("work", "dtype"), DTYPES)
@pytest.mark.parametrize("options", [{}, *CLIPPING, {"clip_norm": 1e9}], ids=str)
@pytest.mark.parametrize("mass", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}])
def test_clipping_and_momentum_are_the_core_s(device, work, dtype, options, mass):
    config, backend = DLSConfig(**options, **mass), Device(torch.device(device))
    rng = np.random.default_rng(0)
    velocity = rng.standard_normal(3000).astype(work) if mass else None
    for factor in (1, 0, 1e-3, 1e3):
        gradient = store(factor * rng.standard_normal(3000), dtype)
        into = np.empty(3000, work)
        expected = momentum.correct(gradient, velocity, into, config, 2.0)
        there = tensor(into, device)
        of = None if velocity is None else tensor(velocity, device)
        given_gradient = tensor(gradient, device)
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
def test_adam_s_updates_are_the_core_s(device, work, dtype, options):
    """Up to rounding: roots are not the same to the bit everywhere."""
    config, backend = DLSConfig(adam=(0.5, 0.999), **options), Device(torch.device(device))
    rng, weights = np.random.default_rng(0), adam.Weights()
    own = adam.Moments(np.zeros(3000, work), np.zeros(3000, work))
    there = adam.Moments(*(tensor(array, device) for array in own))
    for factor in (1, 1e-3, 0, 1e3):
        gradient = store(factor * rng.standard_normal(3000), dtype)
        gradient[7] = store(np.array([np.nan if factor == 1e3 else 1.0]), dtype)[0]
        weights = weights.with_one_more(config.adam)
        by = adam.factors_of(config, weights, 2.0, np.dtype(work))
        then, update = adam.Moments(*(np.empty(3000, work) for _ in own)), np.empty(3000, work)
        adam.update_of(gradient, own, then, update, by, config, 2.0)
        after = adam.Moments(*(tensor(np.zeros(3000, work), device) for _ in own))
        result, given_gradient = tensor(np.zeros(3000, work), device), tensor(gradient, device)
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
    device, work, dtype, value
):
    config, backend = DLSConfig(clip_value=value), Device(torch.device(device))
    rng = np.random.default_rng(0)
    for factor in (1e-3, 1, 1e3):
        gradient = store(factor * rng.standard_normal(3000), dtype)
        there = tensor(gradient, device)
        norm, expected = backend.norm(there, value), l2_norm(gradient, value)
        assert float(norm) == pytest.approx(expected, rel=1e-6)
        into, limit = tensor(np.empty(3000, work), device), 2.0
        result = backend.correct(there, None, into, config, 1.0, Norm(norm, limit))
        core = np.empty(3000, work)
        momentum.correct(gradient, None, core, config, 1.0, Norm(expected, limit))
        np.testing.assert_allclose(array_of(result), core, rtol=1e-6)
    for bad in (np.nan, np.inf):
        gradient[7] = store(np.array([bad]), dtype)[0]
        assert not math.isfinite(float(backend.norm(tensor(gradient, device), value)))


@on_each_device
@pytest.mark.parametrize("options", [*CLIPPING, {"momentum": 0.5, "nesterov": True}], ids=str)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_clipping_leaves_nan_and_inf_to_be_found(device, options, bad):
    gradient = torch.ones(1000, device=device)
    gradient[77] = bad
    velocity, into = torch.ones_like(gradient), torch.empty_like(gradient)
    backend, config = Device(torch.device(device)), DLSConfig(**options)
    corrected = backend.correct(gradient, velocity if config.momentum else None, into, config, 1.0)
    assert not backend.finite(corrected)
    assert backend.find(torch.zeros_like(gradient), corrected, 3).result() is None


@on_each_device
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_whether_a_gradient_is_finite(device, dtype):
    for shape in ((), (0,), (1,), (30, 20)):
        gradient = torch.full(shape, torch.finfo(dtype).max, dtype=dtype, device=device)
        assert finite_future(gradient).result() is True
        for bad in (float("nan"), float("inf"), -float("inf")) if gradient.numel() else ():
            gradient.view(-1)[-1] = bad
            assert finite_future(gradient).result() is False


@on_each_device
def test_of_many_gradients_the_host_is_told_at_once(device, monkeypatch):
    copies = []

    def copied(tensor, read):
        copies.append(len(tensor))
        return on_device.DeviceFuture(tensor, read)

    monkeypatch.setattr(looking, "DeviceFuture", copied)
    looks, bad = looking.Looks(), (float("nan"), float("inf"), -float("inf"))
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        gradients = []
        for number in range(150):
            gradient = torch.full((number,), torch.finfo(dtype).max, dtype=dtype, device=device)
            if number % 4:
                gradient[number // 2] = bad[number % 4 - 1]
            gradients.append(gradient.requires_grad_(number % 5 == 0))
        told = [looks.look(gradient) for gradient in gradients]
        assert copies == []
        assert told[0] is True  # of nothing
        assert told[1].ready() in (True, False)
        with torch.no_grad():
            for gradient in gradients:
                gradient.fill_(1)  # Horovod reduces it where it is, when it has been looked at
        after = looks.look(gradients[3])
        seen = [one.result() for one in told[1:]]
        assert seen == [number % 4 == 0 for number in range(1, 150)]
        assert all(one.ready() for one in told[1:])
        assert after.result()
        assert copies == [128, 22]
        copies.clear()


@on_each_device
def test_histograms_zeros_and_what_was_saved(device):
    backend, rng = Device(torch.device(device)), np.random.default_rng(0)
    values = (rng.standard_normal(5000) ** 9).astype(np.float32)
    values[:10] = -0.0
    assert np.array_equal(backend.histogram(tensor(values, device)), histogram(values))
    own = backend.zeros(5000, np.dtype(np.float32))
    assert (own.device.type, own.dtype) == (device, torch.float32)
    for saved in (values, torch.from_numpy(values)):
        backend.load(own.zero_(), saved)
        assert bits(backend.to_host(own)) == bits(values)
    backend.clear(own, np.array([3, 4999], np.uint32))
    assert np.flatnonzero(backend.to_host(own) != values).tolist() == [4999]
    backend.fill(own, math.inf)
    assert torch.isposinf(own).all()


# Nothing waits for a device in backward -----------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_shapes_never_depend_on_data(dtype, monkeypatch):
    """Tensors of the device "meta" have none: to look at some is an error."""
    copied = []
    monkeypatch.setattr(on_device, "DeviceFuture", lambda tensor, read: copied.append(tensor))
    config = DLSConfig(momentum=0.5, nesterov=True, clip_norm=1.0, clip_value=0.1)
    backend = Device(torch.device("meta"))
    work = np.dtype("float64" if dtype == torch.float64 else "float32")
    residual = backend.zeros(100_000, work)
    gradient = torch.empty(100_000, dtype=dtype, device="meta")
    backend.find(residual, gradient, 1000)
    finite_future(gradient)
    backend.find(residual, backend.correct(gradient, residual, residual.clone(), config), 1000)
    found = ((work.itemsize // 4 + 1) * 1000 + WINDOW,)
    assert [tuple(x.shape) for x in copied] == [found, (2,), found]
    with pytest.raises((RuntimeError, NotImplementedError)):
        bool(gradient.sum() > 0)


def test_copies_are_asynchronous_and_looked_at_when_their_event_is_done(monkeypatch):
    class OnGPU:
        device, is_cuda = torch.device("cuda", 1), True

        def to(self, device, non_blocking):
            assert (device, non_blocking) == ("cpu", True)
            log.append("copied")
            return torch.arange(3)

    class Event:
        done = False

        def __init__(self, blocking):
            assert blocking  # or the host would spin

        def record(self, stream):
            log.append(f"event on stream of {stream}")

        def query(self):
            return self.done

        def synchronize(self):
            log.append("waited")
            Event.done = True

    log = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", str)
    later = on_device.DeviceFuture(OnGPU(), np.sum)
    assert not later.ready()
    assert log == ["copied", "event on stream of cuda:1"]
    assert later.result() == 3
    assert log[2:] == ["waited"]
    assert later.ready()


@contextlib.contextmanager
def no_waiting():
    """Makes torch raise an error where the host would wait for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@no_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_gpu_is_not_waited_for(dtype):
    config = DLSConfig(momentum=0.5, nesterov=True, clip_norm=1.0, clip_value=0.1)
    backend = Device(torch.device("cuda"))
    residual = backend.zeros(
        3_000_000, np.dtype("float64" if dtype == torch.float64 else "float32")
    )
    gradient = torch.randn(3_000_000, device="cuda").to(dtype)
    busy = torch.randn(4000, 4000, device="cuda")
    backend.find(residual, gradient, 30_000).result()  # what is slow once is behind us
    torch.cuda.synchronize()
    with no_waiting():
        for _ in range(200):
            busy = busy @ busy
        corrected = backend.correct(gradient, residual, torch.empty_like(residual), config)
        results = [
            backend.find(residual, gradient, 30_000),
            backend.find(residual, corrected, 30_000),
        ]
        finite = finite_future(gradient)
    assert not results[0].ready()
    found = [result.result() for result in results]
    assert all(result.ready() for result in results)
    assert finite.result()
    expected = passes.find(array_of(residual), array_of(gradient), 30_000)
    assert found[0].threshold == expected.threshold
