"""What is made of the figures of a job of rounds."""

from __future__ import annotations

from benchmarks.rounds.summary import ratio


def test_ratios_are_of_one_round_each():
    def turns(*seconds):
        return {"turns": [{"seconds": [s]} for s in seconds]}

    job = {
        "methods": {"dense": turns(8, 10, 30), "dls:0.01": turns(2, 1, 2), "off": turns(1, 0, 0)}
    }
    assert ratio(job, "dls:0.01") == [4, 10, 15]
    assert ratio(job, "dls:0.01", without="off") == [7, 10, 15]
