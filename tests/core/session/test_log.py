"""What is logged: on rank 0 only, once or ever more seldom, never in a step without news."""

import logging

import numpy as np
import pytest

from hvd_dls.core.balancing.attendance import PATIENCE
from hvd_dls.core.session import log
from tests.core.ranks import LAYERS, SPARSE, draw_gradients, make_sessions, run, step


@pytest.fixture(autouse=True)
def _everything(caplog):
    caplog.set_level(logging.DEBUG, "hvd_dls")


def told(caplog, level=logging.INFO):
    """Messages of at least this level since the last time, as (level, text)."""
    messages = [(r.levelname, r.getMessage()) for r in caplog.records if r.levelno >= level]
    assert all(record.name == "hvd_dls" for record in caplog.records)
    caplog.clear()
    return messages


def announced(caplog, n_ranks=2, **options):
    for session in make_sessions(n_ranks, **options):
        session.announce()
    return told(caplog, logging.DEBUG)


# The start --------------------------------------------------------------------------------------


def test_one_line_says_what_will_happen(caplog):
    (level, text), *reasons = announced(caplog)
    assert level == "INFO"
    (session, _) = make_sessions(2)
    gradients = [draw_gradients(np.random.default_rng(0), session) for _ in range(2)]
    sessions = make_sessions(2)
    step(sessions, gradients)
    megabytes = f"{sessions[0].last_step.sparse_bytes / 1e6:.3g} MB"
    assert text == (
        "compressing 4 of 6 layers: 682 of 68192 entries a step, in 1 payload(s) of "
        f"{megabytes} together; 2 layers (0.000288 MB) go dense; 2 ranks"
    )
    assert reasons == [
        ("DEBUG", f"layer {name!r} of shape {shape} goes dense: bias, normalisation or scalar")
        for name, shape in (("conv1.bias", (32,)), ("fc.bias", (40,)))
    ]


def test_it_says_that_owners_add_up(caplog):
    text = announced(caplog, exchange="sparse_allreduce")[0][1]
    assert text.endswith("2 ranks, owners add up what they send")


def test_it_says_that_payloads_are_of_more_gradients_than_usual(caplog):
    text = announced(caplog, bucket_bytes=96 << 20)[0][1]
    assert text.endswith("2 ranks, up to 96 MiB of gradients in each payload")


def test_buckets_are_counted(caplog):
    assert "in 4 payload(s) of" in announced(caplog, bucket_bytes=1)[0][1]


def test_why_layers_go_dense_is_said_for_who_asks(caplog):
    options = {"layer_density": {"conv1.weight": "dense"}, "dense_below": 2000, "cost_rule": True}
    lines = [text for level, text in announced(caplog, 8, density=0.5, **options)]
    reasons = {text.split("'")[1]: text.rpartition(": ")[2] for text in lines[1:] if "'" in text}
    assert reasons["conv1.weight"] == "layer_density says so"
    assert reasons["conv3.weight"] == "fewer than dense_below=2000 entries"
    assert reasons["fc.weight"].startswith("a dense allreduce moves no more bytes than 8")


def test_nothing_compressed_is_a_warning(caplog):
    messages = announced(caplog, dense_below=1 << 30)
    assert messages[-1] == (
        "WARNING",
        "nothing will be compressed: all layers go dense (conv1.weight: fewer than "
        "dense_below=1073741824 entries)",
    )
    assert messages[0][1].startswith("compressing 0 of 6 layers: 0 of 0 entries a step, in 0 pay")


def test_on_one_rank_there_is_nothing_to_warn_of(caplog):
    assert [level for level, _ in announced(caplog, 1)] == ["INFO"] + ["DEBUG"] * len(LAYERS)


# Steps ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"dense_steps": 3}, {"bucket_bytes": 1}], ids=str)
def test_ordinary_steps_are_silent(caplog, options):
    sessions = make_sessions(2, warmup_steps=4, **options)
    run(sessions, np.random.default_rng(0), 12)
    assert told(caplog, logging.NOTSET) == []


def test_skipped_steps_are_told_first_and_then_seldom(caplog):
    sessions, rng = make_sessions(2, nonfinite="skip"), np.random.default_rng(0)
    seen = []
    for number in range(1, 31):
        gradients = [draw_gradients(rng, session) for session in sessions]
        gradients[1]["fc.bias"][0] = np.nan
        gradients[0]["conv3.weight"][0] = np.inf
        step(sessions, gradients)
        seen += [(number, level, text) for level, text in told(caplog)]
    where = "layer 'conv3.weight' on rank 0, layer 'fc.bias' on rank 1"
    assert seen == [
        (n, "WARNING", f"step skipped for NaN or Inf in {where}; {n} step(s) skipped so far")
        for n in (1, 10)
    ]


def test_of_a_skipped_dense_step_only_the_layer_is_known(caplog):
    sessions = make_sessions(2, nonfinite="skip", dense_steps=2)
    gradients = [draw_gradients(np.random.default_rng(0), session) for session in sessions]
    gradients[1]["fc.bias"][0] = np.nan
    step(sessions, gradients)
    assert [text for _, text in told(caplog)] == [
        "step skipped for NaN or Inf in layer 'fc.bias'; 1 step(s) skipped so far"
    ]


def test_a_message_names_few_layers(caplog):
    log.skipped(1, [(f"layer{i}", 0) for i in range(50)])
    log.share_given_away([f"layer{i}" for i in range(50)], 10)
    skipped, away = (text for _, text in told(caplog))
    assert skipped.count("layer '") == 8
    assert "'layer7' and 42 more for 10 steps" in away


@pytest.mark.parametrize(
    ("count", "worth"),
    [
        (0, False),
        (1, True),
        (2, False),
        (10, True),
        (11, False),
        (20, False),
        (100, True),
        (1000, True),
    ],
)
def test_the_first_the_tenth_the_hundredth_are_told(count, worth):
    assert log.told_again(count) == worth


def test_layers_that_stay_away_and_come_back_are_told_once(caplog):
    sessions, rng, seen = make_sessions(2), np.random.default_rng(0), []
    run(sessions, rng, 1)
    for number in range(1, 40):
        gone = ("conv2.weight", "fc.weight") if number < 30 else ("fc.weight",)
        gradients = [draw_gradients(rng, session) for session in sessions]
        step(sessions, [{n: g for n, g in x.items() if n not in gone} for x in gradients])
        seen += [(number, *message) for message in told(caplog)]
    assert seen == [
        (
            PATIENCE,
            "WARNING",
            "no gradient came from 'conv2.weight', 'fc.weight' for 10 steps: their share of the "
            "budget goes to the other layers until they come back",
        ),
        (
            30,
            "INFO",
            "gradients come from 'conv2.weight' again: they have a share of the budget",
        ),
    ]


@pytest.mark.parametrize("strategy", ["norm", "global", "hard"])
def test_other_strategies_tell_of_it_too(caplog, strategy):
    options = {"threshold": 6.0} if strategy == "hard" else {}
    sessions, rng = make_sessions(2, strategy=strategy, **options), np.random.default_rng(0)
    for _ in range(PATIENCE + 3):
        gradients = [draw_gradients(rng, session) for session in sessions]
        step(sessions, [{name: g[name] for name in SPARSE[:2]} for g in gradients])
    assert len(told(caplog)) == 1
