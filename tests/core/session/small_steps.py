"""A small model, and steps of it, for tests of what ends a step."""

import numpy as np
import pytest

from hvd_dls.core.balancing.layers import layer_spec
from hvd_dls.errors import RanksDisagreeError
from tests.core.network import outputs
from tests.core.ranks import draw_gradients, frozen, make_sessions, run, same

LAYERS = [
    layer_spec("conv1.weight", (12, 5, 3, 3)),
    layer_spec("conv1.bias", (12,)),
    layer_spec("conv2.weight", (20, 30)),
    layer_spec("conv3.weight", (40, 10)),
    layer_spec("fc.weight", (20, 60)),
    layer_spec("fc.bias", (20,)),
]
NAMES = [layer.name for layer in LAYERS]


def sessions_of(n_ranks=2, **options):
    options = {"dense_below": 0, "density": 0.05} | options
    if options.get("bucket_bytes") == 50_000:
        options["bucket_bytes"] = 4000
    return make_sessions(n_ranks, LAYERS, **options)


def trained(rng, steps=3, n_ranks=2, **options):
    sessions = sessions_of(n_ranks, **options)
    run(sessions, rng, steps)
    return sessions


def some_step(ranks, rng):
    """A step of all ranks; each rank's sums."""
    gradients = [draw_gradients(rng, rank.session) for rank in ranks]
    for rank, of_rank in zip(ranks, gradients, strict=True):
        rank.begin()
        for name in rng.permutation(NAMES).tolist():
            rank.compress(name, of_rank[name])
    for rank in ranks:
        rank.receive()
    sums = []
    for rank in ranks:
        sums.append(outputs(rank.session, NAMES))
        for name in rng.permutation(NAMES).tolist():
            rank.finish(name, sums[-1][name], ranks)
    return sums


def check_alike(ranks, others):
    """Two worlds that have been through the same go on alike."""
    rngs = np.random.default_rng(99), np.random.default_rng(99)
    for _ in range(3):
        sums, expected = some_step(ranks, rngs[0]), some_step(others, rngs[1])
        assert all(same(out, sums[0]) for out in sums)
        assert all(same(*pair) for pair in zip(sums, expected, strict=True))
        for rank, other in zip(ranks, others, strict=True):
            assert frozen(rank.session) == frozen(other.session)
    assert ranks[0].network.quiet


def hear(ranks, of=r"\[\d.*\]"):
    """These ranks wait for what others have given up, and give it up, too."""
    for rank in ranks:
        with pytest.raises(
            RanksDisagreeError, match=rf"^rank\(s\) {of} gave step \d+ up, by an exc"
        ):
            rank.receive()
        rank.abandon()
