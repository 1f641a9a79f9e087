"""Find and settle: both backends, and on several threads, against brute force, to the bit."""

import importlib.util
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_dls.core.balancing.sketch import SAMPLE
from hvd_dls.core.selection import passes, passes_numpy, threads
from tests.core.strategies import KINDS, seeds
from tests.core.taking import sketch

BACKENDS = {"numpy": passes_numpy}
if importlib.util.find_spec("numba"):
    from hvd_dls.core.selection import passes_numba

    BACKENDS |= {"numba": passes_numba, "threads": passes_numba}

# (residual, gradient); uint16 is bfloat16.
DTYPES = [
    (np.float32, np.float32),
    (np.float32, np.float16),
    (np.float32, np.uint16),
    (np.float64, np.float64),
]


@pytest.fixture(autouse=True, params=BACKENDS)
def backend(request, monkeypatch):
    monkeypatch.setattr(passes, "_backend", BACKENDS[request.param])
    if request.param == "threads":  # for all but the smallest layers
        monkeypatch.setattr(threads, "_LEAST", 32)
        threads.use(3)
    yield request.param
    threads.use(1)


def store(values, dtype):
    """Values in one of the gradient dtypes, rounded to nearest even, by other means than ours."""
    if dtype != np.uint16:
        with np.errstate(over="ignore"):
            return np.asarray(values).astype(dtype)
    values = np.asarray(values, np.float32)
    down = (values.view(np.uint32) >> 16).astype(np.uint16)
    up = down + (down & 0x7FFF < 0x7F80).astype(np.uint16)
    with np.errstate(over="ignore", invalid="ignore"):
        to_down = np.abs(np.float64(values) - load(down))
        # One above the largest finite number counts as 2**128 here, not as Inf.
        above = np.where(up & 0x7FFF == 0x7F80, np.copysign(2.0**128, np.float64(values)), load(up))
        to_up = np.abs(above - np.float64(values))
    nearest = np.where((to_up < to_down) | ((to_up == to_down) & (down & 1 == 1)), up, down)
    return np.where(np.isinf(values), down, nearest).astype(np.uint16)


def load(gradient):
    """A gradient's values, in float64."""
    if gradient.dtype == np.uint16:
        gradient = (gradient.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(invalid="ignore"):  # signalling NaN
        return gradient.astype(np.float64)


def plus(residual, gradient):
    with np.errstate(over="ignore", invalid="ignore"):
        return residual + load(gradient).astype(residual.dtype)


def top_k(total, k):
    """Indices of the k largest magnitudes, ties to the lower index, ascending."""
    return np.sort(np.lexsort((np.arange(len(total)), -np.abs(total)))[:k])


def check_find(residual, gradient, k, last_threshold=0.0):
    """All laws of finding on one case; returns what was found."""
    before = residual.tobytes(), gradient.tobytes()
    found = passes.find(residual, gradient, k, last_threshold)
    assert (residual.tobytes(), gradient.tobytes()) == before
    total = plus(residual, gradient)
    if not np.isfinite(total).all():
        assert found is None
        return None
    expected = top_k(total, k)
    assert found.indices.dtype == np.uint32
    assert np.array_equal(found.indices, expected)
    assert found.values.dtype == residual.dtype
    assert found.values.tobytes() == total[expected].tobytes()
    assert type(found.threshold) is float
    assert found.threshold == np.abs(total[expected]).min()
    left = total.copy()
    left[expected] = 0
    base, counts = sketch(found.values, left, found.threshold)
    assert found.sketch.base == base
    assert found.sketch.counts.dtype == np.uint32
    assert np.array_equal(found.sketch.counts, counts)
    return found


@st.composite
def cases(draw, sizes=(1, 2, 7, 63, 64, 65, 130, 1000, 2048, 2049, 5000)):
    """Residual, gradient and k: all dtypes, tails and scales, zeros of either sign, ties."""
    rng = np.random.default_rng(draw(seeds))
    kind, n = draw(st.sampled_from(list(KINDS))), draw(st.sampled_from(sizes))
    work, dtype = draw(st.sampled_from(DTYPES))
    scale = draw(st.sampled_from([1, 1, 1000, 1e-6, 1e-41]))
    residual = (KINDS[kind](rng, n) * draw(st.sampled_from([0, 1, 1e-3, scale]))).astype(work)
    gradient = KINDS[kind](rng, n) * scale
    for values in (residual, gradient):
        zeros = rng.random(n) < draw(st.sampled_from([0, 0, 0.5, 1]))
        values[zeros] = rng.choice([0.0, -0.0], np.count_nonzero(zeros))
        if draw(st.booleans()):
            values.sort()
    gradient = store(np.clip(gradient, -60000, 60000), dtype)
    k = draw(st.sampled_from([1, n, (n + 1) // 2, 1 + int(rng.integers(n)), max(1, n // 100)]))
    return residual, gradient, k


@given(cases(), st.sampled_from([0.0, 1e-9, 0.5, 1.0, 1.5, 1000.0]))
def test_what_is_found_is_the_exact_top_k_whatever_the_last_threshold(case, factor):
    residual, gradient, k = case
    exact = np.abs(plus(residual, gradient))[top_k(plus(residual, gradient), k)].min()
    check_find(residual, gradient, k, float(factor * exact))


@given(cases(sizes=(3000,)), st.sampled_from([1e-44, 5e-324, 3e38, 1e300, np.inf, np.nan, -1.0, 7]))
def test_any_last_threshold_will_do(case, last_threshold):
    check_find(*case, last_threshold)


@pytest.mark.parametrize("k", [1, 100, 40_000, 200_003])
@pytest.mark.parametrize("last_threshold", [0.0, 2.0, 1e9])
@pytest.mark.parametrize("shape", ["random", "ascending", "descending", "ties", "one", "zeros"])
def test_many_blocks_and_full_buffers(shape, last_threshold, k):
    rng = np.random.default_rng(k)
    gradient = rng.standard_normal(200_003).astype(np.float32)
    if shape == "one":
        gradient[:] = 0
        gradient[123_456] = -1
    elif shape != "random":
        ranked = np.sort(np.abs(gradient))
        scale = {"ascending": 1, "descending": -1, "ties": 0, "zeros": 0}[shape]
        gradient = ranked[::scale] if scale else np.full_like(ranked, shape == "ties")
    gradient = np.ascontiguousarray(gradient)
    found = check_find(np.zeros_like(gradient), gradient, k, last_threshold)
    if shape == "ties":
        assert np.array_equal(found.indices, np.arange(k))


@pytest.mark.parametrize("n", [SAMPLE, SAMPLE + 1, 2 * SAMPLE, 5 * SAMPLE + 7])
@pytest.mark.parametrize("kind", ["gaussian", "pareto", "octaves"])
def test_sketches_of_large_layers_are_those_of_the_definition(kind, n):
    gradient = KINDS[kind](np.random.default_rng(2), n).astype(np.float32)
    residual = np.roll(gradient, 5)
    for k in (10, n // 100, n // 2):
        check_find(residual, gradient, k)


@pytest.mark.parametrize(("work", "dtype"), DTYPES)
def test_gradients_may_jump_vanish_and_return(work, dtype):
    rng = np.random.default_rng(0)
    residual, threshold = np.zeros(5000, work), 0.0
    for factor in (1, 1, 1000, 1000, 1, 0, 0, *[0] * 30, 1e-4, 1, 1000, 1e-30, 1):
        gradient = store(factor * rng.standard_normal(5000), dtype)
        found = check_find(residual, gradient, 20, threshold)
        total = plus(residual, gradient)
        passes.settle(residual, gradient, found.indices, None, [], 1.0, gradient)
        threshold = found.threshold
        total[found.indices] -= found.values
        assert residual.tobytes() == total.tobytes()  # conservation, to the bit


@pytest.mark.parametrize(("work", "dtype"), DTYPES)
@pytest.mark.parametrize("bad", [[np.nan], [np.inf], [-np.inf], [np.inf, -np.inf]], ids=str)
def test_nan_and_inf_are_found_wherever_they_are(work, dtype, bad):
    n = 5003
    for start in (0, 1000, n - len(bad)):
        for k in (1, 10, n):
            gradient = store(np.ones(n), dtype)
            gradient[start : start + len(bad)] = store(bad, dtype)
            if np.isnan(bad[0]) and dtype == np.uint16:
                gradient[start] = 0xFFC1
            for last_threshold in (0.0, 1.0, 1e38):
                residual = np.ones(n, work)
                assert check_find(residual, gradient, k, last_threshold) is None


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_sum_that_overflows_is_not_finite(dtype):
    residual = np.full(100, np.finfo(dtype).max)
    gradient = np.zeros(100, dtype)
    assert check_find(residual, gradient, 3) is not None
    gradient[50] = np.finfo(dtype).max
    assert check_find(residual, gradient, 3) is None


def test_every_float16_and_bfloat16_has_its_value():
    for dtype in (np.float16, np.uint16):
        gradient = np.arange(1 << 16, dtype=np.uint16)
        finite = np.isfinite(load(gradient.view(dtype)))
        gradient = gradient[finite].view(dtype)
        check_find(np.full(len(gradient), -0.0, np.float32), gradient, len(gradient))


def test_subnormal_gradients_are_not_lost():
    tiny = np.finfo(np.float32).smallest_subnormal
    gradient = np.array([0, tiny, 0, -3 * tiny, 2 * tiny], np.float32)
    assert check_find(np.zeros(5, np.float32), gradient, 2, tiny).indices.tolist() == [3, 4]


# Settle -----------------------------------------------------------------------------------------


def settled(residual, gradient, indices, kept, received, scale, dtype):
    """The residual and the sum, one plain step after the other."""
    residual = plus(residual, gradient)
    residual[indices] = 0 if kept is None else kept
    total = np.zeros_like(residual)
    touched = np.zeros(len(residual), np.bool_)
    with np.errstate(all="ignore"):
        for where, values in received:
            for i, value in zip(where, values, strict=True):
                total[i] = total[i] + value
                touched[i] = True
        out = np.where(touched, total * residual.dtype.type(scale), 0).astype(residual.dtype)
    return residual, store(out, dtype)


def check_settle(residual, gradient, indices, kept, received, scale, dtype=None):
    """All laws of settling on one case: with the sum in the gradient's memory, and elsewhere."""
    dtype = dtype or gradient.dtype
    expected = settled(residual, gradient, indices, kept, received, scale, dtype)
    before = gradient.tobytes()
    own, out = residual.copy(), np.full(len(residual), 77, dtype)
    passes.settle(own, gradient, indices, kept, received, scale, out)
    assert gradient.tobytes() == before
    assert own.tobytes() == expected[0].tobytes()
    assert out.tobytes() == expected[1].tobytes()
    out = np.full(len(residual), 77, dtype)
    passes.sum_up(received, scale, out, residual.dtype)
    assert out.tobytes() == expected[1].tobytes()
    if dtype == gradient.dtype:
        own, out = residual.copy(), gradient.copy()
        passes.settle(own, out, indices, kept, received, scale, out)
        assert own.tobytes() == expected[0].tobytes()
        assert out.tobytes() == expected[1].tobytes()


@st.composite
def entries(draw, n, work):
    """What a rank sends of a layer."""
    rng = np.random.default_rng(draw(seeds))
    k = draw(st.sampled_from([1, n, (n + 1) // 2, max(1, n // 100)]))
    indices = np.sort(rng.permutation(n)[:k]).astype(np.uint32)
    values = rng.standard_normal(k) * draw(st.sampled_from([1, 1000, 1e-6, 1e-41, 2.0**-24]))
    values[rng.random(k) < 0.2] = -0.0
    return indices, values.astype(work)


@given(
    cases(sizes=(1, 2, 65, 1000, 20_001)),
    st.data(),
    st.integers(0, 5),
    st.sampled_from([1.0, 0.25, 1 / 3, -2.0, 0.0, -0.0, 1e-40, 1e30]),
)
def test_settling_is_what_the_plain_steps_are(case, data, ranks, scale):
    residual, gradient, _ = case
    work = residual.dtype
    received = [data.draw(entries(len(residual), work)) for _ in range(ranks)]
    indices, kept = data.draw(entries(len(residual), work))
    kept = data.draw(st.sampled_from([None, kept]))
    other = [np.float32, np.float16, np.uint16] if work == np.float32 else [np.float64, np.float32]
    for dtype in {gradient.dtype, np.dtype(data.draw(st.sampled_from(other)))}:
        check_settle(residual, gradient, indices, kept, received, scale, dtype)


def test_ranks_are_added_in_their_order():
    one = np.zeros(1, np.uint32)
    received = [(one, np.array([v], np.float32)) for v in (1e8, 1.0, -1e8, 1.0)]
    residual, gradient = np.zeros((2, 3), np.float32)
    for order in (received, received[::-1], received[1:] + received[:1]):
        check_settle(residual, gradient, one, None, order, 1.0)
        out = np.empty(3, np.float32)
        passes.settle(residual, gradient, one, None, order, 1.0, out)
        expected = np.float32(0)
        for _, values in order:
            expected += values[0]
        assert out[0] == expected


@pytest.mark.parametrize("dtype", [np.float16, np.uint16])
def test_sums_are_rounded_to_nearest_even(dtype):
    """All 16-bit numbers, what lies halfway between them, and the neighbours of that."""
    numbers = load(np.arange(0x8000, dtype=np.uint16).view(dtype))
    numbers = numbers[np.isfinite(numbers)]
    middles = ((numbers[1:] + numbers[:-1]) / 2).astype(np.float32)
    top = np.float32(numbers[-1] + (numbers[-1] - numbers[-2]) / 2)  # from here on Inf
    values = np.concatenate([numbers.astype(np.float32), middles, [top, np.float32(3e38)]])
    up, down = np.float32(np.inf), np.float32(0)
    values = np.concatenate([values, np.nextafter(values, up), np.nextafter(values, down)])
    values = np.concatenate([values, -values])
    where = np.arange(len(values), dtype=np.uint32)
    check_settle(
        np.zeros_like(values), np.zeros_like(values), where[:0], None, [(where, values)], 1.0, dtype
    )


def test_a_sum_that_is_not_a_number_stays_none():
    where = np.zeros(1, np.uint32)
    received = [(where, np.array([v], np.float32)) for v in (np.inf, -np.inf)]
    for dtype in (np.float32, np.float16, np.uint16):
        out = np.zeros(1, dtype)
        passes.settle(*np.zeros((2, 1), np.float32), where, None, received, 1.0, out)
        assert np.isnan(load(out)[0])


def test_what_rounding_took_stays_in_the_residual():
    """A whole step with 16-bit values on the wire: nothing is lost."""
    rng = np.random.default_rng(0)
    residual, gradient = rng.standard_normal((2, 1000)).astype(np.float32)
    total = residual + gradient
    found = passes.find(residual, gradient, 50)
    sent = found.values.astype(np.float16).astype(np.float32)
    kept = found.values - sent
    passes.settle(residual, gradient, found.indices, kept, [(found.indices, sent)], 1.0, gradient)
    assert np.array_equal(residual + gradient, total)


@pytest.mark.parametrize("bad", [[5, 100_000], [70_000, 5], [4_294_967_295]])
@pytest.mark.parametrize("whose", ["own", "received"])
def test_indices_outside_the_layer_are_refused(bad, whose):
    bad, good = np.array(bad, np.uint32), np.array([3], np.uint32)
    own, other = (bad, good) if whose == "own" else (good, bad)
    received = [(good, np.ones(1, np.float32)), (other, np.ones(len(other), np.float32))]
    residual, gradient = np.ones((2, 100_000), np.float32)
    with pytest.raises(ValueError, match="below 100000"):
        passes.settle(residual, gradient, own, None, received, 1.0, gradient)
    if whose == "received":  # and the next call is not disturbed
        with pytest.raises(ValueError, match="below 100000"):
            passes.sum_up(received, 1.0, gradient, residual.dtype)
        check_settle(residual, np.ones_like(residual), good, None, received[:1], 1.0)


def test_layers_of_different_sizes_may_follow_each_other():
    """Memory is shared by all calls."""
    rng = np.random.default_rng(1)
    for n in (10, 100_000, 10, 70_000, 3, 100_000):
        for work, dtype in DTYPES:
            gradient = store(rng.standard_normal(n), dtype)
            found = check_find(np.ones(n, work), gradient, max(1, n // 50))
            received = [(found.indices, found.values)] * 2
            check_settle(np.ones(n, work), gradient, found.indices, None, received, 0.5)


def test_many_ranks():
    rng = np.random.default_rng(1)
    residual, gradient = rng.standard_normal((2, 30_000)).astype(np.float32)
    pick = partial(rng.choice, 30_000, 300, replace=False)
    received = [
        (np.sort(pick()).astype(np.uint32), rng.standard_normal(300).astype(np.float32))
        for _ in range(130)
    ]
    check_settle(residual, gradient, received[0][0], None, received, 1 / 130)


# Neither ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_layer_that_sends_nothing_leaves_all_in_its_residual(dtype):
    residual, gradient = np.arange(5, dtype=dtype), np.ones(5, dtype)
    found = passes.nothing_found(passes.find(residual, gradient, 1))
    assert (len(found.indices), len(found.values), found.threshold) == (0, 0, 0)
    assert found.indices.dtype == np.uint32
    assert found.values.dtype == dtype
    assert found.sketch.counts.any()  # by which its layer gets a share
    out = np.full(5, np.nan, dtype)
    passes.settle(residual, gradient, found.indices, None, [(found.indices, found.values)], 1, out)
    assert residual.tolist() == [1, 2, 3, 4, 5]
    assert not out.any()


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, np.uint16])
def test_what_does_not_count_is_infinite_or_zero(dtype):
    out = np.ones(7, dtype)
    passes.fill(out, np.inf)
    assert np.isposinf(load(out)).all()
    passes.fill(out, 0.0)
    assert out.tobytes() == bytes(out.nbytes)
