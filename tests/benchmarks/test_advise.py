"""Predictions beside measurements: what counts as right."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

from benchmarks.advise.comparing import compare, judge


def case_of(measured, recommended, predicted=1.0):
    """A case with two trainings of two turns each, around what was measured."""
    turns = {name: [0.9 * seconds, 1.1 * seconds] for name, seconds in measured.items()}
    later = {name: [1.2 * each for each in own] for name, own in turns.items()}
    seconds = {"value": predicted, "low": 0.5, "high": 1.5, "turns": 3}
    return {
        "title": "a case",
        "load": [0.0, 1.0],
        "trainings": [turns, later],
        "advice": {
            "rows": [{"name": name, "seconds": seconds} for name in measured],
            "recommended": {"name": recommended},
            "votes": [recommended, recommended, "dense"],
            "worth": 1.2,
        },
    }  # fmt: skip


def test_errors_are_those_of_medians_of_all_turns():
    dense, sparse = compare(case_of({"dense": 1.0, "dls:0.01": 2.0}, "dense"))
    # 0.9, 1.1, 1.08, 1.32
    assert dense.measured == pytest.approx((1.09, 0.9, 1.32))
    assert dense.error == pytest.approx(1 / 1.09 - 1)
    assert dense.apart == pytest.approx(0.2)
    assert (dense.within, sparse.within) == (True, False)


@pytest.mark.parametrize(
    ("recommended", "right", "same"),
    [
        ("dense", False, False),  # twice as slow as the fastest
        ("dls:0.05", True, True),
        ("dls:0.01", False, False),  # bolder than need be
    ],
)
def test_right_is_fast_enough_and_no_bolder_than_need_be(recommended, right, same):
    verdict = judge(case_of({"dense": 2.0, "dls:0.05": 1.05, "dls:0.01": 1.0}, recommended))
    assert (verdict.right, verdict.same) == (right, same)


def test_a_more_cautious_one_is_right_if_it_is_fast_enough():
    verdict = judge(case_of({"dense": 1.3, "fp16": 1.19, "dls:0.05": 1.0}, "fp16"))
    assert verdict.right
    assert verdict.regret == pytest.approx(1.19)
    assert verdict.spared == pytest.approx(1.3)
    assert verdict.turns == (2, 3)


def test_what_is_near_the_limit_is_right_on_either_side():
    measured = {"dense": 1.25, "dls:0.05": 1.0}
    assert all(judge(case_of(measured, name)).right for name in measured)
    assert judge(case_of(measured, "dls:0.05")).same
    assert not judge(case_of(measured, "dense")).same
