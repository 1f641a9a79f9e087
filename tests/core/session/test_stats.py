"""Statistics: what steps add up to, and where their time goes."""

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest

from hvd_dls.core.session.stats import bytes_text
from hvd_dls.core.session.stopwatch import PARTS, Stopwatch
from hvd_dls.core.session.tally import KEPT
from hvd_dls.errors import DLSError
from tests.core.ranks import DENSE, LAYERS, SPARSE, draw_gradients, make_sessions, run, step


def stats_of(session, window=100):
    return session.tally.stats(session.last_step, session.skipped, window)


def trained(steps, rng, n_ranks=2, **options):
    """Sessions, and the first one's record of each step."""
    sessions, records = make_sessions(n_ranks, **{"density": 0.02} | options), []
    for _ in range(steps):
        run(sessions, rng, 1)
        records.append(sessions[0].last_step)
    return sessions, records


@pytest.mark.parametrize("strategy", ["dls", "layerwise", "global", "norm", "hard"])
def test_windows_add_up_the_records_of_their_steps(strategy):
    own = {"threshold": 4.0} if strategy == "hard" else {}
    sessions, records = trained(9, np.random.default_rng(0), strategy=strategy, **own)
    stats = stats_of(sessions[0], window=4)
    for period, of in (
        (stats.last, records[-1:]),
        (stats.window, records[-4:]),
        (stats.all, records),
    ):
        assert period.steps == len(of)
        assert period.entries == sum(record.k.sum() for record in of)
        for name in ("sparse_bytes", "dense_bytes", "payloads", "repeated"):
            assert getattr(period, name) == sum(getattr(record, name) for record in of)
        k = sum(record.k for record in of)
        np.testing.assert_allclose(period.densities, k / stats.sizes / len(of))
        assert period.density == pytest.approx(k.sum() / stats.sizes.sum() / len(of))
        for part, seconds in asdict(period.seconds).items():
            told = sum(getattr(record.seconds, part) for record in of)
            assert seconds == pytest.approx(told, abs=1e-9)
        assert period.elapsed > 0
    assert stats.layers == tuple(SPARSE)
    assert stats.thresholds.tolist() == records[-1].thresholds.tolist()
    assert stats.spread == pytest.approx(records[-1].threshold_spread(), nan_ok=True)


def test_bytes_are_told_beside_those_of_dense_training():
    sessions, _ = trained(3, np.random.default_rng(0), n_ranks=4)
    period = stats_of(sessions[1]).all
    whole = sum(layer.size * layer.itemsize for layer in LAYERS)
    vectors = sum(layer.size * layer.itemsize for layer in LAYERS if layer.name in DENSE)
    assert period.whole_bytes == 3 * whole
    assert period.whole_link_bytes == round(3 * whole * 1.5)  # 2 (P - 1) / P
    assert period.dense_bytes == 3 * vectors
    assert period.link_bytes == round(3 * period.sparse_bytes + 1.5 * period.dense_bytes)


def test_skipped_steps_are_counted_where_they_came():
    rng = np.random.default_rng(0)
    sessions = make_sessions(2, density=0.02, nonfinite="skip")
    for number in range(6):
        gradients = [draw_gradients(rng, session) for session in sessions]
        if number in (1, 2, 5):
            gradients[1]["fc.weight"][0] = np.nan
        step(sessions, gradients)
    stats = stats_of(sessions[0], window=2)
    assert stats.skipped == 3
    assert (stats.all.steps, stats.all.skipped) == (3, 2)  # the third came after the last one made
    assert (stats.window.steps, stats.window.skipped) == (2, 2)
    assert (stats.last.steps, stats.last.skipped) == (1, 0)


def test_a_window_may_be_longer_than_training_and_is_limited():
    sessions, _ = trained(2, np.random.default_rng(0))
    assert stats_of(sessions[0], window=KEPT).window.steps == 2
    for window in (0, -1, KEPT + 1, 2.0, True, None):
        with pytest.raises(DLSError, match=f"window={window}"):
            stats_of(sessions[0], window=window)


def test_what_is_kept_does_not_grow_with_the_steps():
    (session,) = make_sessions(1, density=0.02)
    run([session], np.random.default_rng(0), 1)
    for _ in range(KEPT + 50):
        session.tally.add(session.last_step, 0)
    assert len(session.tally._before) == KEPT
    assert stats_of(session, KEPT).window.steps == KEPT
    assert stats_of(session).all.steps == KEPT + 51


def test_whole_gradients_of_a_dense_step_count_as_sent_whole():
    sessions, _ = trained(3, np.random.default_rng(0), dense_steps=2)
    stats = stats_of(sessions[0])
    whole = sum(layer.size * layer.itemsize for layer in LAYERS)
    assert stats.all.dense_bytes == 2 * whole + stats.last.dense_bytes
    assert stats.all.density == pytest.approx((2 + stats.last.density) / 3)


def test_one_rank_sends_nothing():
    sessions, _ = trained(2, np.random.default_rng(0), n_ranks=1)
    period = stats_of(sessions[0]).all
    assert (period.sparse_bytes, period.dense_bytes, period.whole_bytes) == (0, 0, 0)
    assert period.density == 0
    assert str(stats_of(sessions[0]))


def test_time_is_told_by_part():
    _, records = trained(3, np.random.default_rng(0))
    for record in records:
        seconds = asdict(record.seconds)
        here = [seconds[part] for part in PARTS if part not in ("average", "wait")]
        assert all(value > 0 for value in here)
        assert seconds["total"] == pytest.approx(sum(seconds[part] for part in PARTS))


def test_a_skipped_step_leaves_no_time_to_the_next_one():
    rng = np.random.default_rng(0)
    sessions = make_sessions(2, density=0.02, nonfinite="skip")
    gradients = [draw_gradients(rng, session) for session in sessions]
    gradients[0]["fc.weight"][0] = np.inf
    step(sessions, gradients)
    assert set(sessions[0].watch.seconds.values()) == {0.0}


def test_statistics_go_on_with_another_number_of_ranks():
    sessions, _ = trained(4, np.random.default_rng(0))
    heirs = make_sessions(4, density=0.02)
    for heir in heirs:
        heir.inherit(sessions[0])
    run(heirs, np.random.default_rng(1), 2)
    assert stats_of(heirs[3]).all.steps == 6
    assert stats_of(heirs[3], window=1).window.steps == 1


def test_statistics_are_plain_values_and_a_short_table():
    sessions, _ = trained(4, np.random.default_rng(0))
    stats = stats_of(sessions[0])
    loaded = json.loads(json.dumps(stats.as_dict(), allow_nan=False))
    assert loaded["layers"] == SPARSE
    assert loaded["window"]["densities"] == pytest.approx(stats.window.densities.tolist())
    assert loaded["all"]["seconds"]["find"] == stats.all.seconds.find
    assert replace(stats, spread=math.inf).as_dict()["spread"] is None
    lines = str(stats).splitlines()
    assert len(lines) <= 20
    assert len({len(line) for line in lines[1:]}) == 1  # columns are aligned
    assert "2.0" in str(stats)  # percent


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 B"), (999, "999 B"), (1234, "1.23 kB"), (999_600, "1 MB"), (2.5e9, "2.5 GB"),
     (2.5e12, "2,500 GB")],
)  # fmt: skip
def test_bytes_are_written_with_a_unit(number, text):
    assert bytes_text(number) == text


class Clock:
    """Tells what it is set to."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr("hvd_dls.core.session.stopwatch.perf_counter", lambda: self.now)


def test_what_is_worked_while_waiting_is_no_wait(monkeypatch):
    clock, watch = Clock(monkeypatch), Stopwatch()
    with watch.waiting():
        clock.now += 5
        watch.seconds["unpack"] += 2
    assert watch.seconds["wait"] == 3


def test_the_total_is_that_of_the_outermost_call_and_ends_with_the_step(monkeypatch):
    clock, watch = Clock(monkeypatch), Stopwatch()
    assert watch.enter()
    assert not watch.enter()
    clock.now += 4
    assert watch.lap().total == 4
    clock.now += 1
    watch.leave()
    clock.now += 7
    watch.enter()
    clock.now += 2
    assert watch.lap().total == 3


def test_what_was_sent_is_waited_for_until_it_arrives(monkeypatch):
    clock, watch = Clock(monkeypatch), Stopwatch()
    watch.arrived()
    watch.sent()
    clock.now += 1
    watch.sent()
    clock.now += 2
    watch.arrived()
    watch.arrived()
    assert watch.lap().wait == 2
