"""Algorithm 2: Property 1 and Property 2, exactly; the online form, within a bin."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from hvd_dls.core.balancing.balance import balance_at_once, one_step_adjustment, optimal_adjustment
from hvd_dls.core.balancing.curves import ExactCurves, SketchedCurves
from hvd_dls.core.balancing.ratios import apportion
from hvd_dls.core.balancing.sketch import edges
from tests.core.strategies import CONTINUOUS, KINDS, Model, global_top_k, models, seeds, split
from tests.core.taking import stacked, take


def furthest_apart(curves, k, min_k):
    """(giver, taker, difference): the smallest magnitude sent by a layer above its floor, the
    largest one unsent anywhere; None if they are in order."""
    sent = np.where(k > min_k, curves.smallest_sent(k), np.inf)
    unsent = np.where(k < curves.sizes, curves.largest_unsent(k), -np.inf)
    giver, taker = int(np.argmin(sent)), int(np.argmax(unsent))
    difference = float(unsent[taker]) - float(sent[giver])
    return (giver, taker, difference) if difference > 0 else None


def count_exchanges(curves, k, min_k, at_most):
    for n in range(at_most + 1):
        moved = one_step_adjustment(curves, k, min_k)
        if np.array_equal(moved, k):
            return n
        k = moved
    raise AssertionError(f"more than {at_most} exchanges")


# Exactly ----------------------------------------------------------------------------------------


@given(models())
def test_property_2_one_exchange_halves_the_difference_of_its_pair(model):
    curves = ExactCurves(model.layers)
    k = model.k
    for _ in range(20):
        pair = furthest_apart(curves, k, model.min_k)
        after = one_step_adjustment(curves, k, model.min_k)
        if pair is None:
            assert np.array_equal(after, k)
            return
        giver, taker, difference = pair
        change = after - k
        assert change[giver] < 0 < change[taker] == -change[giver]
        assert np.count_nonzero(change) == 2
        limit_binds = after[giver] == model.min_k or after[taker] == len(model.layers[taker])
        k = after
        sent, unsent = curves.smallest_sent(k).astype(float), curves.largest_unsent(k).astype(float)
        # Either way round: neither layer keeps unsent what is much above what the other sends.
        left = max(unsent[taker] - sent[giver], unsent[giver] - sent[taker])
        assert limit_binds or left <= difference / 2 * (1 + 1e-6)


@given(models())
def test_property_1_optimal_adjustment_ends_at_the_exact_global_top_k(model):
    k = optimal_adjustment(ExactCurves(model.layers), model.k, model.min_k)
    assert k.sum() == model.k.sum()
    assert np.all((np.minimum(model.min_k, model.sizes) <= k) & (k <= model.sizes))
    sent, unsent = split(model, k)
    assert np.array_equal(np.sort(np.concatenate(sent)), global_top_k(model))
    largest_unsent = max((u[-1] for u in unsent if len(u)), default=0)
    above_floor = [s[0] for s, n in zip(sent, k, strict=True) if n > model.min_k]
    assert all(smallest >= largest_unsent for smallest in above_floor)


@given(models(kinds=tuple(CONTINUOUS)))
def test_optimal_adjustment_takes_few_exchanges_per_layer(model):
    at_most = 4 * len(model.layers) + 10  # seen: 3.8 a layer
    count_exchanges(ExactCurves(model.layers), model.k, model.min_k, at_most)


@given(st.sampled_from([2, 3, 6]), st.sampled_from([2, 20, 200]), seeds)
def test_exchanges_are_bounded_even_on_adversarial_data(n_layers, size, seed):
    """algorithm.md, section 4: at most L exchanges cut the range of thresholds by a quarter."""
    rng = np.random.default_rng(seed)
    layers = [
        rng.random() / 2 + rng.choice([-1, 1], size) * np.exp2(-rng.uniform(1, 50, size))
        for _ in range(n_layers)
    ]
    curves = ExactCurves(layers)
    k = np.full(n_layers, 1)
    k[0] = rng.integers(1, size + 1)
    pair = furthest_apart(curves, k, 1)
    assume(pair is not None)
    smallest_gap = np.diff(np.unique(np.abs(np.concatenate(layers)))).min()
    quarters = np.log(max(1, pair[2] / smallest_gap)) / np.log(4 / 3)
    count_exchanges(curves, k, 1, at_most=int(n_layers * (quarters + 1)))


@given(models(), st.integers(0, 8))
def test_steps_counts_exchanges(model, steps):
    curves, one_by_one = ExactCurves(model.layers), model.k
    for _ in range(steps):
        one_by_one = one_step_adjustment(curves, one_by_one, model.min_k)
    at_once = optimal_adjustment(curves, model.k, model.min_k, steps=steps)
    assert np.array_equal(at_once, one_by_one)


@given(models())
def test_a_balanced_choice_does_not_move(model):
    curves = ExactCurves(model.layers)
    k = optimal_adjustment(curves, model.k, model.min_k)
    assert np.array_equal(one_step_adjustment(curves, k, model.min_k), k)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("low", [1.0, 1.5, 3e-8, 6e4])
def test_neighbouring_floats_are_exchanged_although_no_middle_lies_between(dtype, low):
    # Of two neighbours one is even, and the middle is rounded to it: try both.
    for a in (dtype(low), np.nextafter(dtype(low), dtype(np.inf))):
        b = np.nextafter(a, dtype(np.inf))
        curves = ExactCurves([np.full(3, a), np.full(3, b)])
        assert optimal_adjustment(curves, np.array([3, 1])).tolist() == [1, 3]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_largest_floats_do_not_overflow(dtype):
    top = np.finfo(dtype).max
    curves = ExactCurves([np.full(3, top / 2, dtype), np.full(3, top, dtype)])
    assert optimal_adjustment(curves, np.array([3, 1])).tolist() == [1, 3]


@pytest.mark.parametrize(
    ("layers", "k", "min_k", "balanced"),
    [
        pytest.param([[3, 1, 2]], [2], 1, [2], id="one layer"),
        pytest.param([[1], [2], [3]], [1, 1, 1], 1, [1, 1, 1], id="layers of one element"),
        pytest.param([[0, 0, 0], [1, 2, 3]], [3, 1], 1, [1, 3], id="zero layer"),
        pytest.param([[0, 0], [0, 0]], [1, 2], 1, [1, 2], id="nothing but zeros"),
        pytest.param([[1, 1, 1], [1, 1, 1]], [1, 3], 1, [1, 3], id="nothing but ties"),
        pytest.param([[1, 2, 3], [9, 8, 7]], [2, 2], 2, [2, 2], id="all at the floor"),
        pytest.param([[1, 2, 3], [9, 8, 7]], [3, 3], 1, [3, 3], id="all sent"),
        pytest.param([[5], [9, 8, 7, 1]], [1, 1], 3, [1, 1], id="layer smaller than the floor"),
        pytest.param([[100, 1, 1], [99, 98, 97]], [2, 1], 1, [1, 2], id="taker at k = 1"),
    ],
)
def test_special_cases(layers, k, min_k, balanced):
    curves = ExactCurves([np.array(layer, float) for layer in layers])
    assert optimal_adjustment(curves, np.array(k), min_k).tolist() == balanced


def test_the_start_is_not_changed():
    k = np.array([3, 1])
    optimal_adjustment(ExactCurves([np.zeros(3), np.ones(3)]), k)
    assert k.tolist() == [3, 1]


# From sketches ----------------------------------------------------------------------------------


def sketches(ranks, k):
    """All ranks' sketches of ranks[rank][layer], when each layer sends k entries."""
    rows = []
    for *of_layer, n in zip(*ranks, k, strict=True):
        rows.append([take(values, n)[0].sketch for values in of_layer])
    return rows


def many_ranks(model, n_ranks, seed):
    """The model's layers on rank 0, and data of the same kind and scale on the others."""
    rng = np.random.default_rng(seed)
    scales = [np.abs(layer).mean() for layer in model.layers]
    others = [
        [
            (scale * KINDS[model.kind](rng, len(layer))).astype(layer.dtype)
            for scale, layer in zip(scales, model.layers, strict=True)
        ]
        for _ in range(n_ranks - 1)
    ]
    return [model.layers, *others]


def extremes(ranks, k, min_k, slack):
    """Largest unsent magnitude, and smallest sent of all layers above their floor.

    ``slack`` entries of each layer and rank count for neither, nor do unsent ones so small that
    some rank's sketch does not show them.
    """
    largest_unsent, smallest_sent, n_ranks = 0.0, np.inf, len(ranks)
    for *of_layer, n, row in zip(*ranks, k, sketches(ranks, k), strict=True):
        falling = np.sort(np.abs(np.concatenate(of_layer)))[::-1]
        base = max(sketch.base for sketch in row)
        unsent = falling[(n + slack) * n_ranks :]
        unsent = unsent[unsent >= edges(base, base)]
        largest_unsent = max(largest_unsent, unsent.max(initial=0))
        if n - slack > min_k:
            smallest_sent = min(smallest_sent, falling[(n - slack) * n_ranks - 1])
    return largest_unsent, smallest_sent


METHODS = {
    "at once": balance_at_once,
    "all exchanges": optimal_adjustment,
    "DLS(4)": lambda *args: optimal_adjustment(*args, steps=4),
}


def rounds(balance, ranks, k, min_k, at_most=400):
    """k after so many steps on the same data, or after nothing moves any more."""
    for _ in range(at_most):
        curves = SketchedCurves(*stacked(sketches(ranks, k)), np.array(list(map(len, ranks[0]))))
        before, k = k, balance(curves, k, min_k)
        assert k.sum() == before.sum()
        if np.array_equal(before, k):
            break
    return k


@pytest.mark.parametrize("method", METHODS)
@given(
    model=models(kinds=tuple(CONTINUOUS), n_layers=[2, 5, 12], dtypes=[np.float32]),
    n_ranks=st.integers(1, 3),
    seed=seeds,
)
def test_sketches_lead_to_one_threshold_within_a_bin(method, model, n_ranks, seed):
    ranks = many_ranks(model, n_ranks, seed)
    k = rounds(METHODS[method], ranks, model.k, model.min_k)
    assert np.all((np.minimum(model.min_k, model.sizes) <= k) & (k <= model.sizes))
    # Several ranks share one k: an entry more or less fits one of them better.
    largest_unsent, smallest_sent = extremes(ranks, k, model.min_k, slack=min(n_ranks - 1, 1))
    assert largest_unsent <= 1.125 * smallest_sent


def net(kind, min_k, density):
    """Forty layers as of a real net: 300 to 20,000 entries, scales over twelve octaves."""
    rng = np.random.default_rng(1)
    sizes = np.exp(rng.uniform(np.log(300), np.log(20_000), 40)).astype(int)
    scales = np.exp2(rng.normal(0, 2, 40))
    layers = [
        (scale * KINDS[kind](rng, n)).astype(np.float32)
        for scale, n in zip(scales, sizes, strict=True)
    ]
    total = round(density * sizes.sum())
    k = apportion(density * sizes, total, np.full(40, min_k), sizes)
    return Model(kind, layers, k, min_k)


def energy(model, k):
    """Energy of what k sends, over that of the exact global top-k with the same floor."""
    sent, _ = split(model, k)
    energies = [
        np.square(values, dtype=np.float64).sum()
        for values in (np.concatenate(sent), global_top_k(model))
    ]
    return energies[0] / energies[1]


# On data that stays the same.  What is missing to 1: layers whose next entry lies below the window.
@pytest.mark.parametrize(
    ("method", "steps"), [("at once", 6), ("all exchanges", 6), ("DLS(4)", 40)]
)
@pytest.mark.parametrize("kind", CONTINUOUS)
@pytest.mark.parametrize(("min_k", "density"), [(1, 0.002), (1, 0.05), (1, 0.5), (10, 0.005)])
def test_sketches_reach_the_energy_of_the_global_top_k(method, steps, kind, min_k, density):
    model = net(kind, min_k, density)
    k = rounds(METHODS[method], [model.layers], model.k, min_k, at_most=steps)
    assert energy(model, k) > 0.995


@pytest.mark.parametrize("kind", CONTINUOUS)
def test_dls_4_improves_with_every_step(kind):
    model = net(kind, 1, 0.01)
    k, energies = model.k, [energy(model, model.k)]
    while len(energies) < 40:
        k = rounds(METHODS["DLS(4)"], [model.layers], k, 1, at_most=1)
        energies.append(energy(model, k))
    assert np.all(np.diff(energies) > -1e-4)
    assert energies[-1] > 0.999
