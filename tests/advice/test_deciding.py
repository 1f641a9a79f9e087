"""From times to a recommendation, from sizes and times to latency and bandwidth."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_dls.advice.candidates import DENSE, FP16, Candidate, candidates
from hvd_dls.advice.deciding import Prediction, decide, recommend
from hvd_dls.advice.link import Line, fit_line
from hvd_dls.advice.plan import Plan
from hvd_dls.errors import DLSError

SECONDS = st.floats(1e-4, 1e3)
BOTH = ("allgather", "sparse_allreduce")
TRIED = candidates((0.05, 0.01, 0.001), ("float32", "bfloat16"), BOTH, BOTH)
TIMES = st.fixed_dictionaries(dict.fromkeys(TRIED, SECONDS))
WORTH = st.floats(1, 3)
ONE, TENTH = Candidate("dls", 0.01), Candidate("dls", 0.001)


def test_candidates_come_with_the_most_cautious_first_and_say_what_to_write():
    names = [each.name for each in candidates((0.001, 0.01), ("bfloat16", "float32"))]
    assert names == [
        "dense",
        "fp16",
        *(f"dls:{d}{v}" for d in (0.01, 0.001) for v in ("", ":bfloat16")),
    ]
    between = Candidate("dls", 0.01, "bfloat16", hierarchical=True)
    code = "compression=DLSCompressor(density=0.01, values='bfloat16', hierarchical=True)"
    assert (between.code, FP16.code) == (code, "compression=hvd.Compression.fp16")
    assert between.title == "DLS 1 %, bfloat16, hierarchical"
    owners = Candidate("dls", 0.01, exchange="sparse_allreduce")
    assert owners.code == "compression=DLSCompressor(density=0.01, exchange='sparse_allreduce')"
    assert owners.title == "DLS 1 %, sparse_allreduce"


def test_of_one_density_allgather_is_more_cautious_than_owners_and_both_than_a_lower_density():
    names = [each.name for each in candidates((0.001, 0.01), ("float32", "bfloat16"), BOTH)]
    assert names[2:7] == [
        "dls:0.01",
        "dls:0.01:bfloat16",
        "dls:0.01:sparse_allreduce",
        "dls:0.01:bfloat16:sparse_allreduce",
        "dls:0.001",
    ]


@pytest.mark.parametrize("candidate", TRIED, ids=lambda each: each.name)
def test_names_are_read(candidate):
    assert Candidate.of(candidate.name) == candidate


@pytest.mark.parametrize(
    ("exchanges", "ranks", "hosts", "tried"),
    [
        (None, 3, 1, [""]),
        (None, 4, 1, ["", ":sparse_allreduce"]),
        (None, 4, 4, ["", ":sparse_allreduce"]),
        (None, 6, 3, ["", ":hierarchical", ":sparse_allreduce"]),
        (
            None,
            8,
            4,
            ["", ":hierarchical", ":sparse_allreduce", ":hierarchical:sparse_allreduce"],
        ),
        (["allgather"], 8, 4, ["", ":hierarchical"]),
        (["sparse_allreduce"], 2, 1, [":sparse_allreduce"]),
    ],
)
def test_owners_are_tried_where_there_are_enough_or_where_that_is_asked_for(
    exchanges, ranks, hosts, tried
):
    plan = Plan(densities=(0.01,), exchanges=exchanges)
    names = [each.name for each in plan.candidates(ranks, hosts)]
    assert names == ["dense", "fp16", *(f"dls:0.01{end}" for end in tried)]


@given(TIMES, WORTH)
def test_the_recommended_is_fast_enough_and_nothing_more_cautious_is(times, worth):
    chosen = decide(times, worth)
    fastest = min(times.values())
    assert times[chosen] <= worth * fastest
    for other, seconds in times.items():
        if other.caution < chosen.caution:
            assert seconds > worth * fastest
        elif other.caution == chosen.caution:
            assert seconds >= times[chosen]


@given(TIMES, WORTH, st.lists(st.floats(0.1, 10), min_size=2, max_size=6))
def test_what_slows_a_whole_turn_down_changes_no_recommendation(times, worth, factors):
    turns = {each: [seconds * factor for factor in factors] for each, seconds in times.items()}
    fastest = min(times.values())
    if any(abs(seconds / fastest / worth - 1) < 1e-9 for seconds in times.values()):
        return  # rounding may decide
    decision = recommend(turns, worth)
    assert decision.candidate == decide(times, worth)
    assert decision.agreeing == len(factors)
    assert decision.others == []


@given(st.lists(SECONDS, min_size=1, max_size=9))
def test_a_prediction_lies_between_its_turns(turns):
    made = Prediction.of(turns)
    assert made.low == min(turns) <= made.value <= made.high == max(turns)


def test_turns_that_disagree_are_counted_and_named():
    turns = {DENSE: [1.0, 1.0, 1.0], ONE: [0.5, 0.45, 0.95], TENTH: [0.45, 0.3, 0.9]}
    decision = recommend(turns, 1.2)
    assert decision.votes == (ONE, TENTH, DENSE)
    assert decision.candidate == ONE
    assert (decision.agreeing, decision.others) == (1, [DENSE, TENTH])


@given(st.floats(1e-6, 1), st.floats(1e4, 1e11))
def test_the_line_that_made_the_times_is_found(latency, bandwidth):
    sent = np.array([1e3, 1e5, 1e6, 1e7])
    times = latency + sent / bandwidth
    found = fit_line(sent, times)
    np.testing.assert_allclose([found.seconds(x) for x in sent], times, rtol=1e-5)


@given(st.lists(SECONDS, min_size=4, max_size=4))
def test_no_latency_or_bandwidth_is_negative(times):
    found = fit_line([1e3, 1e5, 1e6, 1e7], times)
    assert found.latency >= 0
    assert found.bandwidth > 0


def test_times_that_do_not_grow_have_no_bandwidth():
    assert fit_line([1, 1000], [0.5, 0.5]) == Line(0.5, pytest.approx(float("inf")))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"densities": ()}, "densities=()"),
        ({"densities": (0.01, 1.5)}, "density=1.5"),
        ({"densities": (0.0,)}, "density=0.0"),
        ({"values": ("int8",)}, "values='int8'"),
        ({"exchanges": ()}, "exchanges=()"),
        ({"exchanges": ("auto",)}, "exchange='auto'"),
        ({"seconds": -1.0}, "seconds=-1.0"),
        ({"seconds": float("nan")}, "seconds=nan"),
        ({"turns": 1}, "turns=1"),
        ({"worth": 0.9}, "worth=0.9"),
    ],
)
def test_plans_that_make_no_sense_are_refused(options, named):
    with pytest.raises(DLSError) as refusal:
        Plan(**options)
    assert named in str(refusal.value)
