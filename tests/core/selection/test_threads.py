"""Large layers on several threads: how many, which parts, and the same bits as on one."""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from hvd_dls.core.jit import HAVE_NUMBA
from hvd_dls.core.selection import passes, threads

needs_numba = pytest.mark.skipif(not HAVE_NUMBA, reason="without numba there are no threads")


@pytest.fixture(autouse=True)
def one_thread_afterwards(monkeypatch):
    monkeypatch.setattr(threads, "_LEAST", 1 << 19)  # or the tests would take long
    yield
    threads.use(1)


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("n", [1 << 20, (1 << 20) + 1, 3_000_017, 25_000_000])
def test_parts_cover_a_layer_in_order(n, count):
    threads.use(count)
    parts = threads.parts(n, 64)
    assert 1 <= len(parts) <= count
    assert [start for start, _ in parts] == [0, *(stop for _, stop in parts[:-1])]
    assert parts[-1][1] == n
    assert all(start % 64 == 0 and stop > start for start, stop in parts)


def test_small_layers_and_one_thread_go_the_plain_way():
    threads.use(4)
    assert not threads.of_use(1000)
    assert threads.of_use(1 << 20)
    threads.use(1)
    assert not threads.of_use(1 << 20)


def test_cores_are_shared_among_the_host_s_processes(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [threads.to_spare(n) for n in (1, 4, 8, 16, 64)] == [4, 4, 2, 1, 1]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert threads.to_spare(1) == 1


def step(residual, gradient):
    """What is found, and residual and sum afterwards."""
    residual, out = residual.copy(), np.empty_like(gradient)
    found = passes.find(residual, gradient, 1000, 0.0)
    received = [(found.indices, found.values), (found.indices[:50], found.values[:50])]
    passes.settle(residual, gradient, found.indices, None, received, 0.5, out)
    return b"".join(x.tobytes() for x in (*found[:2], *found.sketch[1:], residual, out))


@needs_numba
@pytest.mark.parametrize("scale", [1, 1e-40])
def test_the_same_bits_on_any_number_of_threads(scale):
    rng = np.random.default_rng(0)
    residual, gradient = (scale * rng.standard_normal((2, 1 << 20))).astype(np.float32)
    expected = step(residual, gradient)
    for count in (2, 3, 1):
        threads.use(count)
        assert step(residual, gradient) == expected


@needs_numba
def test_an_error_in_one_part_is_raised():
    threads.use(2)
    residual, gradient = np.zeros((2, 1 << 20), np.float32)
    bad = np.array([5, 1 << 20], np.uint32)
    with pytest.raises(ValueError, match="below 1048576"):
        passes.settle(residual, gradient, bad, None, [], 1.0, gradient)


@needs_numba
def test_several_threads_of_a_process_may_compress_at_once():
    rng = np.random.default_rng(0)
    cases = rng.standard_normal((4, 2, 1 << 20)).astype(np.float32)
    expected = [step(*case) for case in cases]
    threads.use(2)
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            assert list(pool.map(lambda case: step(*case), cases)) == expected
