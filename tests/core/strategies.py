"""What the core's tests draw from: layers of all shapes and tails, budgets, and brute force."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

from hvd_dls.core.balancing.ratios import apportion

Draw = Callable[[np.random.Generator, int], np.ndarray]

CONTINUOUS: dict[str, Draw] = {
    "gaussian": lambda rng, n: rng.standard_normal(n),
    "laplace": lambda rng, n: rng.laplace(size=n),
    "student": lambda rng, n: rng.standard_t(2, n),
    "pareto": lambda rng, n: rng.pareto(1.5, n) * rng.choice([-1, 1], n),
}
KINDS: dict[str, Draw] = CONTINUOUS | {
    "ties": lambda rng, n: rng.integers(-6, 7, n).astype(float),
    "octaves": lambda rng, n: np.ldexp(1.0, -rng.integers(0, 60, n)),
}

seeds = st.integers(0, 2**32 - 1)
densities = st.sampled_from([1e-4, 1e-3, 1e-2, 0.1, 0.5, 0.9, 1.0])


class Model(NamedTuple):
    """Values of L layers, and how many of them each layer sends."""

    kind: str
    layers: list[np.ndarray]
    k: np.ndarray
    min_k: int

    @property
    def sizes(self) -> np.ndarray:
        return np.array([len(layer) for layer in self.layers])


@st.composite
def models(
    draw: st.DrawFn,
    kinds: Sequence[str] = tuple(KINDS),
    n_layers: Sequence[int] = (1, 2, 3, 5, 8, 20, 60, 200),
    dtypes: Sequence[type] = (np.float32, np.float64),
) -> Model:
    """Layers of 1 to 2,000 values: all tails, many scales, some layers zero or tiny."""
    # sampled_from, because Hypothesis draws numbers near the ends of a range most of the time.
    rng = np.random.default_rng(draw(seeds))
    kind, count = draw(st.sampled_from(kinds)), draw(st.sampled_from(n_layers))
    sizes = np.exp(rng.uniform(0, np.log(draw(st.sampled_from([30, 300, 2000, 1]))), count))
    sizes = sizes.round().astype(int)
    octaves = 0 if kind == "ties" else draw(st.sampled_from([0, 1, 3]))
    scales = np.exp2(rng.normal(0, octaves, count))
    scales[rng.random(count) < draw(st.sampled_from([0, 0, 0.3, 1]))] = 0
    dtype = draw(st.sampled_from(dtypes))
    layers = [
        (scale * KINDS[kind](rng, n)).astype(dtype) for scale, n in zip(scales, sizes, strict=True)
    ]
    min_k = draw(st.sampled_from([1, 1, 2, 3]))
    least = np.minimum(min_k, sizes)
    total = round(draw(densities) * sizes.sum())
    total = int(np.clip(total, least.sum(), sizes.sum()))
    wanted = sizes * draw(st.sampled_from([1, rng.pareto(0.5, count)]))  # uniform, or wild
    return Model(kind, layers, apportion(wanted, total, least, sizes), min_k)


def split(model: Model, k: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Magnitudes of each layer: its k largest, and the others; both ascending."""
    ascending = [np.sort(np.abs(layer)) for layer in model.layers]
    cuts = [len(a) - n for a, n in zip(ascending, k, strict=True)]
    pairs = list(zip(ascending, cuts, strict=True))
    return [a[cut:] for a, cut in pairs], [a[:cut] for a, cut in pairs]


def global_top_k(model: Model) -> np.ndarray:
    """Magnitudes of the exact global top-k, ascending, with each layer's ``min_k`` largest in."""
    forced, others = split(model, np.minimum(model.min_k, model.sizes))
    pool, left = np.concatenate(others), int(model.k.sum()) - sum(map(len, forced))
    best = np.partition(pool, len(pool) - left)[len(pool) - left :] if left else pool[:0]
    return np.sort(np.concatenate([*forced, best]))
