"""Which layers go dense, and the budget of the others."""

import itertools
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_dls.config import STRATEGIES, DLSConfig
from hvd_dls.core.balancing.layers import layer_spec
from hvd_dls.core.balancing.plan import initial_k
from hvd_dls.core.balancing.prior import PRIORS
from hvd_dls.core.balancing.tails import TAILS
from hvd_dls.core.session.planning import make_plan
from hvd_dls.core.wire.buckets import make_bucket
from hvd_dls.core.wire.layout import payload_bytes
from hvd_dls.errors import DLSError
from tests.core.strategies import seeds

CHAIN = [
    layer_spec("conv1.weight", (32, 3, 3, 3)),
    layer_spec("conv1.bias", (32,)),
    layer_spec("bn.weight", (32,)),
    layer_spec("conv2.weight", (64, 32, 3, 3)),
    layer_spec("fc.weight", (100, 4096)),
    layer_spec("fc.bias", (100,)),
    layer_spec("temperature", ()),
]


def names(layers):
    return [layer.name for layer in layers]


def test_every_layer_is_sparse_or_dense_with_a_reason():
    plan = make_plan(CHAIN, DLSConfig(), 2)
    assert names(plan.sparse) == ["conv2.weight", "fc.weight"]
    assert {layer.name: why for layer, why in plan.dense} == {
        "conv1.weight": "fewer than dense_below=1024 entries",
        "conv1.bias": "bias, normalisation or scalar",
        "bn.weight": "bias, normalisation or scalar",
        "fc.bias": "bias, normalisation or scalar",
        "temperature": "bias, normalisation or scalar",
    }
    assert plan.sizes.tolist() == [18_432, 409_600]
    assert plan.budget(0.01) == round(0.01 * (18_432 + 409_600))
    assert plan.dense_bytes == 4 * (864 + 32 + 32 + 100 + 1)


@pytest.mark.parametrize(("dense_below", "sparse"), [(0, 3), (865, 2), (18_433, 1), (1 << 20, 0)])
def test_dense_below_counts_entries(dense_below, sparse):
    plan = make_plan(CHAIN, DLSConfig(dense_below=dense_below, cost_rule=False), 2)
    assert len(plan.sparse) == sparse


@pytest.mark.parametrize("options", [{}, {"density": 1.0, "cost_rule": False, "dense_below": 0}])
def test_one_rank_exchanges_nothing(options):
    plan = make_plan(CHAIN, DLSConfig(**options), 1)
    assert plan.budget(1.0) == 0
    assert plan.sparse == ()
    assert {why for _, why in plan.dense} == {"one rank: nothing to exchange"}
    plan = make_plan(CHAIN, DLSConfig(hierarchical=True), 1)
    assert all("one host: nothing to exchange" in why for _, why in plan.dense)


@pytest.mark.parametrize("world_size", [2, 4, 16, 64, 256, 1024])
@pytest.mark.parametrize("itemsize", [2, 4, 8])
def test_cost_rule_sends_dense_what_sparse_would_not_make_smaller(world_size, itemsize):
    for density, size, min_k in itertools.product(
        [1e-3, 0.01, 0.1, 0.2, 0.25, 0.3, 0.5, 0.648, 1.0], [30, 2000, 1 << 20], [1, 10]
    ):
        layer = layer_spec("w", (size, 1), itemsize=itemsize)
        config = DLSConfig(density=density, dense_below=0, min_k=min_k)
        k = max(min_k, round(density * size))
        allgather = (world_size - 1) * payload_bytes(make_bucket([layer], config), k)
        allreduce = 2 * (world_size - 1) / world_size * size * itemsize
        if allgather >= allreduce:
            ((_, why),) = make_plan([layer], config, world_size).dense
            assert f"no more bytes than {world_size} sparse payloads" in why
        elif round(density * size) >= min_k:
            assert make_plan([layer], config, world_size).sparse == (layer,)


def test_cost_rule_prefers_dense_where_both_cost_the_same():
    layer = layer_spec("w", (2000, 1))
    config = DLSConfig(dense_below=0)
    bucket = make_bucket([layer], config)
    k = next(k for k in range(1, 2000) if 2 * payload_bytes(bucket, k) == 2 * 4 * 2000)
    assert make_plan([layer], replace(config, density=k / 2000), 2).sparse == ()
    assert make_plan([layer], replace(config, density=(k - 5) / 2000), 2).sparse == (layer,)


def test_without_cost_rule_a_density_of_one_sends_everything_sparse():
    plan = make_plan(CHAIN, DLSConfig(density=1.0, cost_rule=False, dense_below=0), 256)
    assert names(plan.sparse) == ["conv1.weight", "conv2.weight", "fc.weight"]
    assert plan.budget(1.0) == plan.sizes.sum()


def test_layers_without_entries_go_dense():
    empty = layer_spec("empty", (0, 5))
    plan = make_plan([empty, *CHAIN], DLSConfig(dense_below=0, cost_rule=False), 2)
    assert "empty" not in names(plan.sparse)


def test_no_layers_make_an_empty_plan():
    plan = make_plan([], DLSConfig(), 2)
    assert (plan.sparse, plan.dense, plan.budget(1.0)) == ((), (), 0)
    assert initial_k(plan, DLSConfig()).tolist() == []


def test_a_name_that_occurs_twice_is_refused():
    with pytest.raises(DLSError, match=r"layer name 'conv1\.bias' occurs 2 times"):
        make_plan([*CHAIN, CHAIN[1]], DLSConfig(), 2)


def test_a_budget_below_the_floor_is_refused_with_all_its_numbers():
    with pytest.raises(DLSError) as error:
        make_plan(CHAIN, DLSConfig(density=1e-5, min_k=10), 2)
    message = str(error.value)
    for part in ("density=1e-05", "4 of 428032 entries", "2 layers", "min_k=10 need 20"):
        assert part in message


@given(seeds, st.sampled_from([1, 3, 50]), st.sampled_from([1, 5, 40]), st.booleans())
def test_following_the_advice_of_that_refusal_works(seed, n_layers, min_k, cost_rule):
    rng = np.random.default_rng(seed)
    sizes = np.exp(rng.uniform(np.log(1024), np.log(300_000), n_layers)).astype(int)
    layers = [layer_spec(f"l{i}", (size, 1)) for i, size in enumerate(sizes.tolist())]
    options = {"min_k": min_k, "cost_rule": cost_rule}
    with pytest.raises(DLSError) as error:
        make_plan(layers, DLSConfig(density=1e-7, **options), 2)
    advised = float(re.search(r"raise density to at least ([\d.e-]+),", str(error.value)).group(1))
    plan = make_plan(layers, DLSConfig(density=advised, **options), 2)
    assert plan.budget(advised) >= min_k * len(plan.sparse)
    assert advised <= 1.1 * min_k * n_layers / sizes.sum()


# The first step's ratios ------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("density", [0.001, 0.03, 0.9, 1.0])
@pytest.mark.parametrize("min_k", [1, 20])
def test_the_first_step_s_entries_add_up_to_the_budget(strategy, prior, tail, density, min_k):
    config = DLSConfig(
        density=density,
        strategy=strategy,
        threshold=1.0 if strategy == "hard" else None,
        prior=prior,
        tail=tail,
        min_k=min_k,
        cost_rule=False,
    )
    plan = make_plan(CHAIN, config, 2)
    k = initial_k(plan, config, norms=dict.fromkeys(names(CHAIN), 8.0))
    assert k.sum() == plan.budget(density) == round(density * plan.sizes.sum())
    assert np.all((min_k <= k) & (k <= plan.sizes))


@pytest.mark.parametrize("prior", PRIORS)
def test_layerwise_starts_with_the_density_in_every_layer(prior):
    config = DLSConfig(strategy="layerwise", prior=prior, density=0.02)
    plan = make_plan(CHAIN, config, 2)
    assert initial_k(plan, config) == pytest.approx(0.02 * plan.sizes, abs=1)


def test_uniform_prior_starts_like_layerwise():
    config = DLSConfig(prior="uniform", density=0.02)
    plan = make_plan(CHAIN, config, 2)
    assert initial_k(plan, config) == pytest.approx(0.02 * plan.sizes, abs=1)


def test_layers_of_larger_variance_start_with_larger_ratios():
    config = DLSConfig(prior="weight_norm", density=0.02)
    plan = make_plan(CHAIN, config, 2)
    norms = {layer.name: 1.0 for layer in CHAIN} | {plan.sparse[1].name: 3.0}  # v = 1, 1/9
    ratios = initial_k(plan, config, norms) / plan.sizes
    assert ratios[0] > 2 * ratios[1]
    assert ratios[1] < 0.02 < ratios[0]


def test_weight_norm_prior_without_norms_is_refused():
    config = DLSConfig(prior="weight_norm")
    with pytest.raises(DLSError, match="one weight norm per layer"):
        initial_k(make_plan(CHAIN, config, 2), config)


def test_dense_layers_in_between_do_not_break_the_paper_s_chain():
    """Eq. 8 leads from each layer to the next one, whether that goes sparse or dense."""
    layers = [
        layer_spec("a", (64, 64, 3, 3)),
        layer_spec("small", (8, 64, 1, 1)),  # v = 64 / (9 * 8)
        layer_spec("b", (64, 8, 3, 3)),  # v = 9 * 8 / 64 * 64 / (9 * 8) = 1
    ]
    all_sparse = DLSConfig(density=0.1, dense_below=0, cost_rule=False)
    dense_small = DLSConfig(density=0.1, dense_below=513, cost_rule=False)
    assert names(make_plan(layers, dense_small, 2).sparse) == ["a", "b"]
    for config in (all_sparse, dense_small):
        plan = make_plan(layers, config, 2)
        ratios = initial_k(plan, config) / plan.sizes
        assert ratios[-1] == pytest.approx(ratios[0], rel=0.05)
