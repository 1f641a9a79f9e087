"""Strategies by which each rank chooses for itself: global, norm, hard."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvd_dls.core.balancing.layers import layer_spec
from hvd_dls.core.selection.passes_numpy import narrow, widened
from hvd_dls.core.session.baselines import count_reaching, global_k
from hvd_dls.errors import DLSError
from tests.core.ranks import (
    LAYERS,
    SPARSE,
    copies,
    draw_gradients,
    make_sessions,
    receive,
    run,
    same,
    send,
    step,
)
from tests.core.strategies import KINDS, seeds

few = settings(max_examples=8)


@st.composite
def models(draw):
    """Residuals and gradients of several layers; some entries, layers or models are zero."""
    rng = np.random.default_rng(draw(seeds))
    kind, count = draw(st.sampled_from(list(KINDS))), draw(st.sampled_from([1, 2, 5, 20]))
    dtype = draw(st.sampled_from([np.float32, np.float64, np.float16, np.uint16]))
    work = np.float64 if dtype == np.float64 else np.float32
    scales = rng.choice(draw(st.sampled_from([[1], [0, 1], [0], [0.25, 1, 8]])), count)
    residuals, gradients = [], []
    for scale in scales:
        n = draw(st.sampled_from([1, 2, 30, 500]))
        residuals.append((scale * KINDS[kind](rng, n)).astype(work))
        gradient = np.clip(scale * KINDS[kind](rng, n), -1e4, 1e4)
        if dtype == np.uint16:
            bits = np.empty(n, np.uint16)
            narrow(gradient.astype(np.float32), bits)
            gradient = bits
        gradients.append(gradient.astype(dtype))
    return residuals, gradients


def magnitudes_of(residuals, gradients):
    return [np.abs(r + widened(g)) for r, g in zip(residuals, gradients, strict=True)]


# Global -----------------------------------------------------------------------------------------


@given(models(), st.sampled_from([0, 1, 7, 0.1, 0.5, 1.0, 2.0]))
def test_global_k_is_that_of_a_stable_sort_of_all_layers(model, share):
    entries = sum(map(len, model[0]))
    k = share if isinstance(share, int) else round(share * entries)
    chosen = global_k(*model, k)
    magnitudes = magnitudes_of(*model)
    owners = np.repeat(np.arange(len(magnitudes)), list(map(len, magnitudes)))
    best = np.argsort(-np.concatenate(magnitudes), kind="stable")[:k]
    assert chosen == np.bincount(owners[best], minlength=len(magnitudes)).tolist()
    assert sum(chosen) == min(k, entries)


def test_ties_go_to_the_first_layers():
    ones = [np.ones(4, np.float32)] * 3
    zeros = [np.zeros(4, np.float32)] * 3
    for k in range(13):
        expected = [min(4, max(0, k - 4 * layer)) for layer in range(3)]
        assert global_k(ones, zeros, k) == expected
        assert global_k(zeros, zeros, k) == expected
    larger = [ones[0], 2 * ones[1], ones[2]]
    assert global_k(larger, zeros, 6) == [2, 4, 0]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_layers_that_are_not_finite_get_one_entry_to_be_found(bad):
    residuals = [np.zeros(n, np.float32) for n in (5, 1, 9)]
    gradients = [np.ones(n, np.float32) for n in (5, 1, 9)]
    gradients[2][4] = bad
    assert global_k(residuals, gradients, 7) == [1, 1, 1]
    huge = [np.full(n, 3e38, np.float32) for n in (5, 1, 9)]
    assert global_k(huge, huge, 7) == [1, 1, 1]


@pytest.mark.parametrize("k", [0, 5])
def test_no_layers_get_nothing(k):
    assert global_k([], [], k) == []


@few
@given(seeds, st.sampled_from([0.001, 0.01, 0.3, 1.0]), st.sampled_from([0, 3]))
def test_global_is_ideal_on_each_rank(seed, density, warmup_steps):
    rng = np.random.default_rng(seed)
    sessions = make_sessions(
        2, strategy="global", density=density, measure_every=1, warmup_steps=warmup_steps
    )
    assert len(sessions[0].routing.buckets) == 1
    for _ in range(5):
        gradients = [draw_gradients(rng, session) for session in sessions]
        before = [copies(session.residuals) for session in sessions]
        step(sessions, gradients, rng)
        for session, residuals, gradient in zip(sessions, before, gradients, strict=True):
            record = session.last_step
            assert record.quality.energy == 1
            assert record.quality.misallocation == 0
            parts = ([each[n] for n in SPARSE] for each in (residuals, gradient))
            magnitudes = magnitudes_of(*parts)
            threshold = np.sort(np.concatenate(magnitudes))[-record.k.sum()]
            for values, name in zip(magnitudes, SPARSE, strict=True):
                assert not session.residuals[name][values > threshold].any()


def test_global_needs_all_layers_in_one_payload():
    layers = [layer_spec("a", (40, 30)), layer_spec("b", (40, 30), itemsize=8)]
    with pytest.raises(DLSError, match="'b' and 'a' cannot travel together"):
        make_sessions(2, layers, strategy="global")


def test_global_shares_the_budget_among_the_layers_of_a_step():
    sessions, rng = make_sessions(2, strategy="global"), np.random.default_rng(0)
    budget = sessions[0].plan.budget(0.01)
    for present in (SPARSE[:1], ["conv3.weight", "fc.bias"], SPARSE):
        gradients = [draw_gradients(rng, session) for session in sessions]
        step(sessions, [{name: g[name] for name in present} for g in gradients])
        sent = dict(zip(SPARSE, sessions[0].last_step.k.tolist(), strict=True))
        assert sum(sent.values()) == budget
        assert {name for name, k in sent.items() if k} <= set(present)


@pytest.mark.parametrize("strategy", ["global", "norm", "hard", "dls"])
def test_a_step_in_which_only_dense_layers_take_part(strategy):
    options = {"threshold": 1.0} if strategy == "hard" else {}
    sessions = make_sessions(2, strategy=strategy, measure_every=1, **options)
    gradients = [draw_gradients(np.random.default_rng(0), session) for session in sessions]
    sums, errors = step(sessions, [{"fc.bias": g["fc.bias"]} for g in gradients])
    assert not errors
    assert np.array_equal(sums[0]["fc.bias"], gradients[0]["fc.bias"] + gradients[1]["fc.bias"])
    assert sessions[0].last_step.step == 1


# Hard -------------------------------------------------------------------------------------------


@given(models(), st.sampled_from([0.25, 1.0, 3.0, 1e9]))
def test_counted_is_what_reaches_the_threshold(model, threshold):
    for residual, gradient in zip(*model, strict=True):
        (values,) = magnitudes_of([residual], [gradient])
        expected = np.count_nonzero(values >= residual.dtype.type(threshold))
        assert count_reaching(residual, gradient, threshold) == expected


@pytest.mark.parametrize("n", [1, (1 << 16) - 1, 1 << 16, (1 << 17) + 1])
def test_nan_and_inf_count_as_reaching_it_wherever_they_are(n):
    for where in {0, n // 2, n - 1}:
        for bad in (np.nan, np.inf, -np.inf):
            gradient = np.zeros(n, np.float32)
            gradient[where] = bad
            assert count_reaching(np.zeros(n, np.float32), gradient, 1.0) == 1


@few
@given(seeds, st.sampled_from([0.25, 6.0, 40.0, 1e6]), st.sampled_from(["float32", "bfloat16"]))
def test_hard_sends_all_that_reaches_the_threshold_and_nothing_else(seed, threshold, values):
    rng = np.random.default_rng(seed)
    sessions = make_sessions(
        3, strategy="hard", threshold=threshold, measure_every=1, values=values
    )
    for _ in range(3):
        gradients = [draw_gradients(rng, session) for session in sessions]
        before = [copies(session.residuals) for session in sessions]
        sums, _ = step(sessions, gradients, rng)
        assert same(sums[0], sums[1])
        for session, residuals, gradient in zip(sessions, before, gradients, strict=True):
            for name, k in zip(SPARSE, session.last_step.k, strict=True):
                total = residuals[name] + gradient[name]
                large = np.abs(total) >= threshold
                assert k == np.count_nonzero(large)
                left = np.where(large, 0, total)
                kept = session.residuals[name] - left  # what rounding takes from a value
                assert np.all(np.abs(kept) <= np.abs(total) * large / 256)
                assert values == "bfloat16" or not kept.any()
    if threshold == 1e6:
        assert not any(sums[0][name].any() for name in SPARSE)
        assert sessions[0].last_step.quality.energy == 1
        assert sessions[0].last_step.quality.misallocation == 0


def test_hard_knows_no_density():
    sparse, dense = (
        make_sessions(2, strategy="hard", threshold=6.0, density=density, warmup_steps=warmup_steps)
        for density, warmup_steps in ((0.001, 3), (0.9, 0))
    )
    for seed in range(4):
        sums = [run(sessions, np.random.default_rng(seed), 1) for sessions in (sparse, dense)]
        assert same(*sums)


# Norm -------------------------------------------------------------------------------------------


def test_norm_sends_in_proportion_to_what_the_last_step_left_and_sent():
    sessions, rng = make_sessions(2, strategy="norm", density=0.05), np.random.default_rng(0)
    sizes = np.array([layer.size for layer in sessions[0].plan.sparse])
    wanted = [np.sqrt(sizes)] * 2
    for _ in range(5):
        gradients = [draw_gradients(rng, session) for session in sessions]
        before = [copies(session.residuals) for session in sessions]
        step(sessions, gradients, rng)
        for rank, session in enumerate(sessions):
            k = session.last_step.k
            assert k.sum() == session.plan.budget(0.05)
            free = k < sizes  # others send all they have
            assert free[1:].all()
            shares = wanted[rank][free] * k[free].sum() / wanted[rank][free].sum()
            assert np.all(np.abs(k[free] - shares) <= 1)
            totals = [(before[rank][n] + gradients[rank][n]).astype(float) for n in SPARSE]
            wanted[rank] = np.array([np.linalg.norm(total) for total in totals])
    assert not np.array_equal(sessions[0].last_step.k, sessions[1].last_step.k)


def test_norm_of_nothing_but_zeros_goes_by_size():
    sessions = make_sessions(2, strategy="norm", density=0.05)
    gradients = draw_gradients(np.random.default_rng(0), sessions[0])
    zeros = {name: np.zeros_like(gradient) for name, gradient in gradients.items()}
    for _ in range(3):
        step(sessions, [zeros, zeros])
    sizes = sessions[0].plan.sizes
    assert np.all(np.abs(sessions[0].last_step.k - 0.05 * sizes) <= 1)
    assert run(sessions, np.random.default_rng(0), 3)["fc.weight"].any()


# All of them ------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["global", "norm", "hard"])
def test_payloads_of_ranks_may_differ_in_length(strategy):
    options = {"threshold": 6.0} if strategy == "hard" else {}
    sessions = make_sessions(2, strategy=strategy, bucket_bytes=1, **options)
    rng, lengths = np.random.default_rng(0), set()
    for _ in range(4):
        gradients = [draw_gradients(rng, session) for session in sessions]
        gradients[1]["fc.weight"] *= 8
        ranks = [send(s, g, list(g)) for s, g in zip(sessions, gradients, strict=True)]
        lengths.update(tuple(len(sent.payloads[b]) for sent in ranks) for b in ranks[0].payloads)
        outs = []
        for session in sessions:
            receive(session, ranks)
            out = {name: np.empty_like(session.residuals[name]) for name in SPARSE}
            for name in SPARSE:
                session.decompress(name, out[name])
            for name in ("conv1.bias", "fc.bias"):
                assert session.accept(name)
            outs.append(out)
        assert same(*outs)
    assert any(one != other for one, other in lengths) == (strategy != "global")


@pytest.mark.parametrize("strategy", ["global", "norm"])
def test_a_rank_that_joins_late_takes_over_the_density_of_the_warm_up(strategy):
    options = {"strategy": strategy, "warmup_steps": 6, "density": 0.01}
    ahead, (_, late) = make_sessions(2, **options), make_sessions(2, **options)
    run(ahead, np.random.default_rng(0), 6)
    late.agree(ahead[0].agreed())
    run([ahead[0], late], np.random.default_rng(1), 1)
    assert late.last_step.step == 7
    assert late.last_step.k.sum() == ahead[0].last_step.k.sum() == late.plan.budget(0.01)


def test_the_layers_stand_as_they_do_in_the_model():
    assert [x.name for x in make_sessions(2, strategy="global")[0].plan.sparse] == [
        layer.name for layer in LAYERS if layer.name in SPARSE
    ]
