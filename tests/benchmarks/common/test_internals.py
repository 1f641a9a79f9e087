"""What benchmarks compute by themselves of what hvd_dls sends."""

from __future__ import annotations

import numpy as np

from benchmarks.common.internals import received_from_ranks
from tests.core.network import connect
from tests.core.ranks import make_sessions
from tests.core.session.test_owners import LAYERS


def test_what_each_rank_receives_where_owners_add_up_is_what_the_others_send_it():
    n_ranks, rng = 5, np.random.default_rng(0)
    sessions = make_sessions(
        n_ranks, LAYERS, density=0.01, exchange="sparse_allreduce", bucket_bytes=2_000
    )
    ranks, buckets = connect(sessions), range(len(sessions[0].routing.buckets))
    assert len(buckets) > 1
    for _ in range(20):  # shares and regions move
        foretold = [received_from_ranks(session) for session in sessions]
        for rank in ranks:
            rank.begin()
            for number, layer in enumerate(reversed(LAYERS)):
                noise = rng.standard_normal(layer.size).astype(np.float32)
                rank.compress(layer.name, (number + 1) * noise)
        for rank in ranks:
            rank.receive()
        network, received = ranks[0].network, np.zeros(n_ranks)
        for bucket in buckets:
            parts = np.array(
                [[len(p) for p in network._scattered[r][bucket][-1]] for r in range(5)]
            )
            out = np.array([len(network._sent[r][bucket][-1]) for r in range(n_ranks)])
            received += parts.sum(axis=0) - np.diagonal(parts) + out.sum() - out
        assert [each.tolist() for each in foretold] == [received.tolist()] * n_ranks
        for rank in ranks:
            for layer in LAYERS:
                rank.session.decompress(layer.name, np.empty(layer.size, np.float32))
