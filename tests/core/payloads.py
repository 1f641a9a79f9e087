"""Payloads to pack and to check: buckets of all kinds, and what ranks found in them."""

from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

from hvd_dls.core.balancing.layers import LayerSpec, layer_spec
from hvd_dls.core.balancing.sketch import LAST_BASE, WINDOW, Sketch
from hvd_dls.core.jit import HAVE_NUMBA
from hvd_dls.core.wire.layout import ABSENT, NOT_FINITE, SENT, Bucket
from hvd_dls.core.wire.pack import pack
from hvd_dls.core.wire.values import decode_counts, encode_counts
from tests.core.strategies import seeds

KINDS = ["float32", "float64", "float16", "bfloat16"]
CODES = ["elias-fano", "plain"]
BOTH = [True, False] if HAVE_NUMBA else [False]


class Found(NamedTuple):
    indices: np.ndarray
    values: np.ndarray
    sketch: Sketch


def bucket_of(sizes, kind="float32", code="elias-fano", name="layer"):
    itemsize = 8 if kind == "float64" else 4
    layers = (layer_spec(f"{name}{i}", (n, 1), itemsize=itemsize) for i, n in enumerate(sizes))
    return Bucket(tuple(layers), kind, code)


def found_in(layer: LayerSpec, k, rng):
    indices = np.sort(rng.choice(layer.size, k, replace=False)).astype(np.uint32)
    values = (rng.standard_normal(k) * 2.0 ** rng.integers(-60, 60)).astype(layer.work_dtype)
    counts = rng.integers(0, 2 ** rng.integers(1, 32), WINDOW).astype(np.uint32)
    return Found(indices, values, Sketch(int(rng.integers(LAST_BASE + 1)), counts))


def found_by_ranks(bucket, k, ranks=2, seed=0, others=(None, ABSENT), share=0.0):
    """What each rank found of each layer; a share of it is one of the others."""
    rng = np.random.default_rng(seed)
    return [
        [
            others[rng.integers(len(others))] if rng.random() < share else found_in(layer, n, rng)
            for layer, n in zip(bucket.layers, k, strict=True)
        ]
        for _ in range(ranks)
    ]


def gather(bucket, k, ranks):
    return np.concatenate([pack(bucket, k, found).payload for found in ranks])


def check(bucket, found, kept, payload):
    for position in range(len(bucket.layers)):
        one, (indices, values) = found[position], payload.entries(position)
        if one is None or one is ABSENT:
            assert payload.status[position] == (NOT_FINITE if one is None else ABSENT)
            assert len(indices) == len(values) == 0
            assert kept[position] is None
            continue
        assert payload.status[position] == SENT
        assert indices.dtype == np.uint32
        assert np.array_equal(indices, one.indices)
        assert values.dtype == one.values.dtype
        left = 0 if kept[position] is None else kept[position]
        assert np.array_equal(values + left, one.values)
        assert (kept[position] is None) == (bucket.values in ("float32", "float64"))
        assert payload.bases[position] == one.sketch.base
        counts = decode_counts(encode_counts(one.sketch.counts))
        assert np.array_equal(payload.counts[position], counts)


@st.composite
def buckets(draw):
    """A bucket, and k of its layers."""
    rng = np.random.default_rng(draw(seeds))
    count = draw(st.sampled_from([1, 2, 3, 10, 160]))
    sizes = np.exp(rng.uniform(0, draw(st.sampled_from([0, 3, 8])), count)).astype(int)
    density = draw(st.sampled_from([0, 0.001, 0.01, 0.1, 1]))
    k = np.ceil(density * sizes).astype(int)
    kind, code = draw(st.sampled_from(KINDS)), draw(st.sampled_from(CODES))
    return bucket_of(sizes, kind, code), k
