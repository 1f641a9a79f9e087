"""What is made of the figures of a job of rounds."""

from __future__ import annotations

import pytest

from benchmarks.common.method import Method
from benchmarks.rounds.summary import ratio, title_of


def test_ratios_are_of_one_round_each():
    def turns(*seconds):
        return {"turns": [{"seconds": [s]} for s in seconds]}

    job = {
        "methods": {"dense": turns(8, 10, 30), "dls:0.01": turns(2, 1, 2), "off": turns(1, 0, 0)}
    }
    assert ratio(job, "dls:0.01") == [4, 10, 15]
    assert ratio(job, "dls:0.01", without="off") == [7, 10, 15]


@pytest.mark.parametrize(
    ("method", "title"),
    [
        ("dense", "dense"),
        ("dls:0.001:bfloat16", "DLS, 0.1%, bfloat16"),
        ("sparse_allreduce:0.01", "DLS, sparse allreduce, 1.0%"),
        ("dls:0.00028", "DLS, 0.028%"),
        ("powersgd:2", "torch DDP, PowerSGD, rank 2"),
        ("local:8", "local steps, 8"),
        ("local-dls:8:0.05", "local steps, 8, DLS, 5.0%"),
        ("local-dls:8:0.05:2.5x2", "local steps, 8, DLS, 5.0%, outer rate 2.5, 2 times the steps"),
        ("local:8:0.7:0.9x2", "local steps, 8, outer rate 0.7, momentum 0.9, 2 times the steps"),
        ("dls:0.01x2", "DLS, 1.0%, 2 times the steps"),
    ],
)
def test_titles_tell_method_and_density(method, title):
    assert title_of(method) == title
    assert Method.parse(method).name == method
