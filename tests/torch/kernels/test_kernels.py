"""The fused kernels beside the core's passes, to the bit: on a GPU, or interpreted on the CPU.

Triton interprets kernels where TRITON_INTERPRET=1 was set before it was imported: see
``tests/torch/test_kernels_interpreted.py``.
"""

import math
import os

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytest.importorskip("horovod.torch")
pytest.importorskip("triton")

from hvd_dls.core.selection import passes  # noqa: E402
from hvd_dls.torch.on_device import Device, have_triton, kernels_run  # noqa: E402
from tests.core.selection.test_passes import DTYPES, cases, entries, store  # noqa: E402
from tests.core.strategies import KINDS  # noqa: E402
from tests.torch.devices import array_of, tensor  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [
    pytest.mark.skipif(
        not INTERPRETED and not torch.cuda.is_available(), reason="no GPU, and not interpreted"
    ),
    pytest.mark.skipif(not have_triton(), reason="this Triton is too old"),
]
some = settings(
    derandomize=True,
    deadline=None,
    max_examples=25 if INTERPRETED else 100,
    suppress_health_check=list(HealthCheck),
)
# The interpreter rounds bfloat16 otherwise than GPUs do.
ROUNDED = [np.float16] if INTERPRETED else [np.float16, np.uint16]
FLOAT32 = [(work, dtype) for work, dtype in DTYPES if work == np.float32]


def backend():
    return Device(torch.device(DEVICE), kernels=True)


def bits(values):
    return (array_of(values) if isinstance(values, torch.Tensor) else values).tobytes()


# Find -------------------------------------------------------------------------------------------


def find(residual, gradient, k, last_threshold, device=None):
    """What the kernels find, and whether they needed the way that they fall back on."""
    there = [tensor(residual, DEVICE), tensor(gradient, DEVICE)]
    future = (device or backend()).find(*there, k, last_threshold)
    found = future.result()
    assert future.ready()
    assert [bits(x) for x in there] == [bits(residual), bits(gradient)]
    return found, future._second is not None


def assert_same(found, expected):
    if expected is None:
        assert found is None
        return
    assert type(found.threshold) is float
    assert found.threshold == expected.threshold
    assert (found.indices.dtype, found.values.dtype) == (np.uint32, np.float32)
    assert bits(found.indices) == bits(expected.indices)
    assert bits(found.values) == bits(expected.values)
    assert found.sketch.base == expected.sketch.base
    assert found.sketch.counts.dtype == np.uint32
    assert np.array_equal(found.sketch.counts, expected.sketch.counts)


@some
@given(case=cases(), factor=st.sampled_from([1.0, 0.5, 1.2, 1.5, 1000.0]))
def test_what_is_found_is_what_the_core_finds_ties_included(case, factor):
    residual, gradient, k = case
    expected = passes.find(residual, gradient, k)
    if expected is None or residual.dtype != np.float32 or 4 * k > len(residual):
        return
    last = factor * expected.threshold
    if 0 < last < math.inf:
        found, otherwise = find(residual, gradient, k, last)
        if not otherwise:
            assert_same(found, expected)
        assert found.threshold == expected.threshold


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_and_what_remains(kind):
    rng = np.random.default_rng(3)
    for n in (4096, 12_289):
        gradient = KINDS[kind](rng, n).astype(np.float32)
        residual = np.roll(gradient, 7)
        for k in (1, 40, n // 8):
            expected = passes.find(residual, gradient, k)
            found, otherwise = find(residual, gradient, k, expected.threshold)
            if not otherwise:
                assert_same(found, expected)


def test_layers_of_many_blocks():
    rng = np.random.default_rng(3)
    n = 200_003 if INTERPRETED else 30_000_001
    gradient, residual = rng.standard_normal((2, n), np.float32)
    device = backend()
    for k in (n // 1000, n // 100, n // 10):
        expected = passes.find(residual, gradient, k)
        for _ in range(6):  # until the bound suits
            found, otherwise = find(residual, gradient, k, expected.threshold, device)
            if not otherwise:
                break
        assert not otherwise
        assert_same(found, expected)


@pytest.mark.parametrize(("work", "dtype"), FLOAT32)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_are_found_wherever_they_are(work, dtype, bad):
    for where in (0, 1000, 5002):
        for k in (1, 10):
            gradient = store(np.ones(5003), dtype)
            gradient[where] = store([bad], dtype)[0]
            residual = np.linspace(0, 1, 5003).astype(work) ** 500
            assert find(residual, gradient, k, 1.5) == (None, False)


def test_sums_that_overflow():
    largest = np.zeros(1000, np.float32)
    largest[100:120] = np.finfo(np.float32).max
    assert find(largest, largest, 5, 1.0) == (None, False)
    assert find(largest, np.zeros_like(largest), 5, 1.0)[0].threshold == largest[100]


def test_a_bound_too_high_or_low_is_seen_and_remembered():
    """Whatever the bound: what is found is right, and the next step aims better."""
    rng = np.random.default_rng(0)
    gradient, zeros = rng.standard_normal(20_001).astype(np.float32), np.zeros(20_001, np.float32)
    expected = passes.find(gradient, zeros, 200)
    for factor in (100, 1e-6):
        device = backend()
        found, otherwise = find(gradient, zeros, 200, factor * expected.threshold, device)
        assert otherwise
        assert found.threshold == expected.threshold
    for _ in range(12):
        found, otherwise = find(gradient, zeros, 200, expected.threshold, device)
        assert not otherwise
        assert_same(found, expected)
    assert 0.8 < device._selector._margin < 1


def test_parts_without_room_for_their_candidates():
    """As of an embedding's few rows in use: the next steps have room."""
    gradient, zeros = np.zeros((2, 20_001), np.float32)
    gradient[4100:5900] = np.arange(1, 1801)
    expected = passes.find(gradient, zeros, 30)
    device = backend()
    for otherwise in (True, False, False):
        found, seen = find(gradient, zeros, 30, expected.threshold, device)
        assert seen == otherwise
        assert_same(found, expected)


def test_values_that_are_no_thresholds():
    gradient = np.arange(100, dtype=np.float32)
    for last in (0.0, math.nan, math.inf, -1.0, 1e-46, 5e-324, 3e38, 1e300):
        there = tensor(gradient, DEVICE)
        found = backend().find(there, there, 5, last).result()
        assert found.threshold == 190


def test_kernels_that_do_not_run_are_not_taken(monkeypatch, caplog):
    assert kernels_run(torch.device(DEVICE))

    def broken(*arguments):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr("hvd_dls.torch.kernels.settling.book", broken)
    kernels_run.cache_clear()
    try:
        assert not kernels_run(torch.device(DEVICE))
    finally:
        kernels_run.cache_clear()
    assert "the GPU kernels do not run here" in caplog.text
    assert "Failed to find C compiler" in caplog.text


# Settle -----------------------------------------------------------------------------------------


@some
@given(
    case=cases(sizes=(1, 2, 65, 1000, 5000)),
    data=st.data(),
    ranks=st.integers(0, 5),
    scale=st.sampled_from([1.0, 0.25, 1 / 3, -2.0, 0.0, -0.0, 1e-40, 1e30]),
)
def test_settling_gives_the_core_s_bits(case, data, ranks, scale):
    residual, gradient, _ = case
    if residual.dtype != np.float32:
        return
    n = len(residual)
    received = [data.draw(entries(n, np.float32)) for _ in range(ranks)]
    indices, kept = data.draw(entries(n, np.float32))
    kept = data.draw(st.sampled_from([None, kept]))
    for dtype in {gradient.dtype, np.dtype(data.draw(st.sampled_from([np.float32, *ROUNDED])))}:
        if dtype == np.uint16 and INTERPRETED:
            continue
        core_residual, core_out = residual.copy(), np.empty(n, dtype)
        passes.settle(core_residual, gradient, indices, kept, received, scale, core_out)
        own, new = tensor(residual, DEVICE), tensor(gradient, DEVICE)
        out = new if dtype == gradient.dtype else tensor(core_out, DEVICE).fill_(77)
        backend().settle(own, new, indices, kept, received, scale, out)
        assert bits(own) == bits(core_residual)
        assert bits(out) == bits(core_out)
        passes.sum_up(received, scale, core_out, np.dtype(np.float32))
        backend().sum_up(received, scale, out.fill_(77), np.dtype(np.float32))
        assert bits(out) == bits(core_out)


@pytest.mark.parametrize("dtype", ROUNDED)
def test_sums_are_rounded_as_the_core_rounds(dtype):
    numbers = np.arange(0x8000, dtype=np.uint16)[:: 16 if INTERPRETED else 1].view(dtype)
    values = array_of(tensor(numbers, "cpu").float())
    values = values[np.isfinite(values)]
    middles = values[1:] / 2 + values[:-1] / 2
    values = np.concatenate([values, middles, np.nextafter(middles, np.float32(np.inf)), -middles])
    where = np.arange(len(values), dtype=np.uint32)
    core, own = np.empty(len(values), dtype), tensor(np.empty(len(values), dtype), DEVICE)
    passes.sum_up([(where, values)], 1.0, core, np.dtype(np.float32))
    backend().sum_up([(where, values)], 1.0, own, np.dtype(np.float32))
    assert bits(own) == bits(core)


def test_settling_layers_of_many_blocks():
    rng = np.random.default_rng(1)
    n = 10_007 if INTERPRETED else 30_000_001
    residual, gradient = rng.standard_normal((2, n), np.float32)
    lists = []
    for rank in range(5):
        indices = np.flatnonzero(rng.random(n) < (0.5 if rank == 3 else 0.01)).astype(np.uint32)
        lists.append((indices, rng.standard_normal(len(indices), np.float32)))
    (indices, kept), *received = lists
    own, there = tensor(residual, DEVICE), tensor(gradient, DEVICE)
    backend().settle(own, there, indices, kept, received, 1 / 3, there)
    out = np.empty_like(gradient)
    passes.settle(residual, gradient, indices, kept, received, 1 / 3, out)
    assert bits(own) == bits(residual)
    assert bits(there) == bits(out)


# Nothing waits for a GPU in backward ------------------------------------------------------------


@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("n", [30_000, 3_000_000])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_gpu_is_not_waited_for(dtype, n):
    device = backend()
    residual = torch.zeros(n, device="cuda")
    gradient = torch.randn(n, device="cuda").to(dtype)
    busy = torch.randn(4000, 4000, device="cuda")
    threshold = device.find(residual, gradient, n // 100).result().threshold
    device.find(residual, gradient, n // 100, threshold).result()  # what is compiled is behind us
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(200):
            busy = busy @ busy
        future = device.find(residual, gradient, n // 100, threshold)
        assert not future.ready()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert future.result().threshold == threshold
    assert future._second is None
