"""The report and its dictionary, whatever the times are."""

from __future__ import annotations

import json
import math

from hypothesis import given
from hypothesis import strategies as st

from hvd_dls.advice.advice import OWNERS, UNKNOWN, Advice, Row
from hvd_dls.advice.candidates import DENSE, Candidate, candidates
from hvd_dls.advice.deciding import Prediction, recommend
from hvd_dls.advice.link import Line

BOTH = ("allgather", "sparse_allreduce")
TRIED = candidates((0.01, 0.001), ("float32",), BOTH, BOTH)
TURNS = st.fixed_dictionaries(
    {each: st.lists(st.floats(1e-4, 100), min_size=3, max_size=3) for each in TRIED}
)


def advice_of(turns, **others):
    rows = tuple(
        Row(
            each,
            Prediction.of(own),
            Prediction.of([dense / x for dense, x in zip(turns[DENSE], own, strict=True)]),
            1e6,
            {} if each.method != "dls" else {"find": 0.001, "wait": 0.1, "total": 0.2},
            tuple(own),
        )
        for each, own in ((each, turns[each]) for each in TRIED if each in turns)
    )
    line = {"allreduce float32": Line(0.001, 1.25e7), "allgather": Line(0.001, math.inf)}
    return Advice(
        ranks=4, hosts=2, local_size=2, entries=1000, tensors=3, lines=line,
        alone=Prediction.of([0.01, 0.02, 0.03]), rows=rows, decision=recommend(turns, 1.2),
        worth=1.2, load=(0.5, 2.0), cores=2, **others,
    )  # fmt: skip


@given(TURNS)
def test_a_report_names_what_to_write_and_what_it_cannot_know(turns):
    advice = advice_of(turns)
    text = str(advice)
    assert UNKNOWN in text
    assert OWNERS in text
    assert "100 Mbit/s sent by a rank" in text
    for each in TRIED:
        assert f"\n{each.title} " in text
    if advice.recommended == DENSE:
        assert "Leave it dense" in text
    else:
        assert f"Recommended: {advice.recommended.code}" in text
    written = json.loads(json.dumps(advice.as_dict(), allow_nan=False))
    assert written["recommended"]["name"] == advice.recommended.name
    assert [row["name"] for row in written["rows"]] == [each.name for each in TRIED]
    assert written["lines"]["allgather"]["bandwidth"] is None


def test_what_is_not_sure_is_said_to_be_so_and_what_was_not_tried_is_named():
    names = (DENSE, Candidate("dls", 0.01), Candidate("dls", 0.001))
    turns = dict(zip(names, ([1.0, 1.0, 1.0], [0.5, 0.45, 0.95], [0.45, 0.3, 0.9]), strict=True))
    text = str(advice_of(turns, unavailable={Candidate("dls", 0.5): "because"}))
    assert "not sure: only 1 of 3 turns" in text
    assert "Single turns speak for: dense, DLS 0.1 %." in text
    assert "not tried: DLS 50 %: because" in text
    assert "DLS 0.1 % is faster still" in text


def test_dense_is_left_where_nothing_is_gained():
    turns = {each: [1.0, 1.0] for each in TRIED} | {DENSE: [0.9, 0.9]}
    assert "Leave it dense: nothing that was tried is faster." in str(advice_of(turns))
    turns |= {Candidate("dls", 0.01): [0.8, 0.8]}
    assert "Leave it dense: the fastest, DLS 1 %, is 1.12 times as fast" in str(advice_of(turns))
