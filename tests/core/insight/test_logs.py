"""Logs: written in a thread, line by line, and read whatever happened to them."""

import json
import logging
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from hvd_dls.core.balancing.layers import layer_spec
from hvd_dls.errors import DLSError
from hvd_dls.insight import make_log
from hvd_dls.insight.lines import VERSION
from hvd_dls.insight.reading import read_run
from tests.core.ranks import draw_gradients, make_sessions, run, step

ROOT = Path(__file__).parents[3]
OTHER = [layer_spec("a.weight", (40, 50)), layer_spec("b.weight", (60, 20))]


def logged(target, every=1, n_ranks=2, layers=None, **options):
    """Sessions whose steps are logged, of rank 0 alone, and the log."""
    sessions = make_sessions(n_ranks, *([layers] if layers else []), **{"density": 0.02} | options)
    log = make_log(target, every, [])
    sessions[0].observers = [log]
    return sessions, log


def write(path, steps, every=1, seed=0, **options):
    sessions, log = logged(path, every, **options)
    with log:
        run(sessions, np.random.default_rng(seed), steps)
    return sessions


def test_each_line_tells_of_the_steps_since_the_last_one(tmp_path):
    sessions, log = logged(tmp_path / "run.jsonl", every=3)
    rng, records = np.random.default_rng(0), []
    with log:
        for _ in range(8):
            run(sessions, rng, 1)
            records.append(sessions[0].last_step)
    (model,) = read_run(tmp_path / "run.jsonl").models
    assert model.steps.tolist() == [1, 3, 6]
    assert model.column("steps").tolist() == [1, 2, 3]
    sent = [record.sparse_bytes for record in records]
    assert model.column("sparse_bytes").tolist() == [sent[0], sum(sent[1:3]), sum(sent[3:6])]
    total = sum(record.seconds.find for record in records[3:6])
    assert model.seconds("find")[2] == pytest.approx(total, abs=1e-6)
    for row, number in enumerate((0, 2, 5)):
        assert model.k[row].tolist() == records[number].k.tolist()
        np.testing.assert_allclose(model.thresholds[row], records[number].thresholds, rtol=1e-5)


def test_a_log_that_begins_later_does_not_count_what_was_before(tmp_path):
    sessions = make_sessions(2, density=0.02)
    run(sessions, np.random.default_rng(0), 4)
    with make_log(tmp_path / "run.jsonl", 5, []) as log:
        sessions[0].observers = [log]
        run(sessions, np.random.default_rng(1), 6)
    (model,) = read_run(tmp_path / "run.jsonl").models
    assert model.steps.tolist() == [5, 10]
    assert model.column("steps").tolist() == [1, 5]


def test_all_lines_are_json_that_others_read(tmp_path):
    write(tmp_path / "run.jsonl", 3, measure_every=2)

    def refuse(name):
        raise ValueError(name)  # NaN, Infinity: not JSON

    lines = (tmp_path / "run.jsonl").read_text().splitlines()
    first, *steps = [json.loads(line, parse_constant=refuse) for line in lines]
    assert (first["kind"], first["version"]) == ("model", VERSION)
    assert (first["rank"], first["world_size"], first["dense_layers"]) == (0, 2, 2)
    assert first["options"]["density"] == 0.02
    assert [line["step"] for line in steps] == [1, 2, 3]
    assert ["energy" in line for line in steps] == [False, True, False]


def test_thresholds_are_read_without_the_loss_scale(tmp_path):
    sessions, log = logged(tmp_path / "run.jsonl")
    with log:
        for number in range(3):
            for session in sessions:
                session.scale_to(2.0**number)
            run(sessions, np.random.default_rng(0), 1)
    (model,) = read_run(tmp_path / "run.jsonl").models
    expected = sessions[0].last_step.thresholds / 4
    np.testing.assert_allclose(model.thresholds[2], expected, rtol=1e-5)


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_line_that_a_crash_cut_off_is_left_out_and_the_next_one_is_whole(tmp_path, cut):
    path = tmp_path / "run.jsonl"
    write(path, 4)
    content = path.read_bytes()
    path.write_bytes(content[:-cut])
    whole = 4 if cut == 1 else 3  # without its line break a line is whole still
    run_ = read_run(path)
    assert run_.models[0].steps.tolist() == [1, 2, 3, 4][:whole]
    assert run_.ignored == (cut > 1)
    write(path, 2)
    run_ = read_run(path)
    assert run_.models[0].steps.tolist() == [1, 2]  # training began anew
    assert run_.ignored == (cut > 1)


def test_a_killed_process_leaves_what_it_had_written(tmp_path):
    program = (
        "import os, signal, sys\n"
        "from tests.core.insight.test_logs import *\n"
        "sessions, log = logged(sys.argv[1])\n"
        "run(sessions, np.random.default_rng(0), 5)\n"
        "log.flush()\n"
        "run(sessions, np.random.default_rng(0), 5)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    path = tmp_path / "run.jsonl"
    ended = subprocess.run([sys.executable, "-c", program, path], cwd=ROOT, check=False)
    assert ended.returncode == -9
    assert len(read_run(path).models[0].steps) >= 5


def test_the_end_of_the_interpreter_writes_what_is_left(tmp_path):
    program = (
        "import sys\n"
        "from tests.core.insight.test_logs import *\n"
        "sessions, log = logged(sys.argv[1])\n"
        "run(sessions, np.random.default_rng(0), 7)\n"
    )
    path = tmp_path / "run.jsonl"
    subprocess.run([sys.executable, "-c", program, path], cwd=ROOT, check=True)
    assert len(read_run(path).models[0].steps) == 7


def test_training_that_goes_on_from_a_checkpoint_takes_the_place_of_what_came_after_it(tmp_path):
    path = tmp_path / "run.jsonl"
    sessions, log = logged(path)
    with log:
        run(sessions, np.random.default_rng(0), 3)
        states = [session.state_dict() for session in sessions]
        states = [json_free_copy(state) for state in states]
        run(sessions, np.random.default_rng(1), 3)
    again, log = logged(path)
    for session, state in zip(again, states, strict=True):
        session.load_state_dict(state)
    with log:
        run(again, np.random.default_rng(2), 2)
    (model,) = read_run(path).models
    assert model.steps.tolist() == [1, 2, 3, 4, 5]
    assert model.k[4].tolist() == again[0].last_step.k.tolist()


def json_free_copy(state):
    arrays = {
        part: {name: values.copy() for name, values in state[part].items()}
        for part in ("residuals", "velocities")
    }
    return state | arrays | {part: state[part].copy() for part in ("ratios", "thresholds")}


def test_several_models_are_told_apart(tmp_path):
    path = tmp_path / "run.jsonl"
    first, log = logged(path)
    second = make_sessions(2, OTHER, density=0.02, dense_below=0)
    second[0].observers = [log]
    rng = np.random.default_rng(0)
    with log:
        for _ in range(3):
            run(first, rng, 1)
            run(second, rng, 1)
    models = read_run(path).models
    assert [model.number for model in models] == [0, 1]
    assert models[1].layers == ["a.weight", "b.weight"]
    assert all(model.steps.tolist() == [1, 2, 3] for model in models)


def test_a_model_among_other_ranks_goes_on_as_the_same_one(tmp_path):
    path = tmp_path / "run.jsonl"
    sessions, log = logged(path)
    heirs = make_sessions(4, density=0.02)
    with log:
        run(sessions, np.random.default_rng(0), 2)
        for heir in heirs:
            heir.inherit(sessions[0])
            heir.agree(heirs[0].agreed())
        heirs[0].observers = [log]
        run(heirs, np.random.default_rng(0), 2)
    (model,) = read_run(path).models
    assert model.steps.tolist() == [1, 2, 3, 4]
    assert model.world_size == 4


def test_only_rank_0_writes_unless_each_has_a_file_of_its_own(tmp_path):
    sessions = make_sessions(3, density=0.02)
    paths = ["one.jsonl", "of-{rank}.jsonl"]
    logs = [[make_log(tmp_path / "new" / path, 1, []) for path in paths] for _ in sessions]
    for session, own in zip(sessions, logs, strict=True):
        session.observers = own
    run(sessions, np.random.default_rng(0), 2)
    for own in logs:
        for log in own:
            log.close()
    names = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert names == ["of-0.jsonl", "of-1.jsonl", "of-2.jsonl", "one.jsonl"]
    assert read_run(tmp_path / "new" / "of-2.jsonl").models[0].rank == 2


def test_the_file_goes_with_rank_0(tmp_path):
    """As in elastic training, where ranks get other numbers."""
    path = tmp_path / "run.jsonl"
    before, after = make_sessions(2, density=0.02), make_sessions(2, density=0.02)
    logs = [make_log(path, 1, []) for _ in before]
    for session, log in zip(before, logs, strict=True):
        session.observers = [log]
    run(before, np.random.default_rng(0), 2)
    for number, session in enumerate(after):
        session.inherit(before[1 - number])
        session.observers = [logs[1 - number]]
    for session in after:
        session.agree(after[0].agreed())
    run(after, np.random.default_rng(0), 2)
    for log in reversed(logs):
        log.flush()
    for log in logs:
        log.close()
    (model,) = read_run(path).models
    assert model.steps.tolist() == [1, 2, 3, 4]


def test_a_second_log_to_the_same_file_is_told_and_leaves_the_first_alone(tmp_path, caplog):
    path = tmp_path / "run.jsonl"
    sessions, log = logged(path)
    run(sessions, np.random.default_rng(0), 1)
    log.flush()
    write(path, 3)
    assert any("another process" in record.getMessage() for record in caplog.records)
    log.close()
    assert read_run(path).models[0].steps.tolist() == [1]


def test_what_fails_is_told_once_and_ends_the_log_alone(caplog):
    calls = []

    def fails(line):
        calls.append(line)
        raise RuntimeError("the disk is full")

    sessions, log = logged(fails)
    with log:
        run(sessions, np.random.default_rng(0), 5)
    assert len(calls) == 1
    told = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert len(told) == 1
    assert "the disk is full" in told[0].getMessage()
    assert sessions[0].last_step.step == 5


def test_writing_is_done_by_another_thread_and_training_does_not_wait_for_it():
    gate, threads = threading.Event(), set()

    def slow(line):
        gate.wait(60)
        threads.add(threading.current_thread().name)

    sessions, log = logged(slow)
    run(sessions, np.random.default_rng(0), 5)  # the first line is still being written
    assert not threads
    gate.set()
    log.close()
    assert threads == {"hvd_dls log"}


def test_a_closed_log_takes_nothing_and_is_among_logs_no_more():
    among, lines = [], []
    log = make_log(lines.append, 1, among)
    among.append(log)
    sessions = make_sessions(2, density=0.02)
    sessions[0].observers = among
    run(sessions, np.random.default_rng(0), 1)
    log.close()
    log.close()
    assert among == []
    run(sessions, np.random.default_rng(0), 1)
    log(sessions[0])
    assert len(lines) == 2


def test_skipped_steps_are_in_the_next_line(tmp_path):
    sessions, log = logged(tmp_path / "run.jsonl", nonfinite="skip")
    rng = np.random.default_rng(0)
    with log:
        for number in range(4):
            gradients = [draw_gradients(rng, session) for session in sessions]
            if number == 1:
                gradients[0]["fc.weight"][0] = np.nan
            step(sessions, gradients)
    (model,) = read_run(tmp_path / "run.jsonl").models
    assert model.steps.tolist() == [1, 2, 3]
    assert model.column("skipped").tolist() == [0, 1, 0]
    assert model.column("skipped_so_far").tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "no step"),
        (b"hello\n\x00\xff\n[1]\n3\n", "4 lines ignored"),
        (b'{"kind":"step","model":0,"step":1}\n', "1 lines ignored"),
        (
            b'{"kind":"model","version":99,"model":0,"rank":0,"world_size":2,'
            b'"layers":[],"sizes":[]}\n',
            "update",
        ),
    ],
)
def test_what_is_no_log_is_refused(tmp_path, content, told):
    path = tmp_path / "run.jsonl"
    path.write_bytes(content)
    with pytest.raises(DLSError, match=told):
        read_run(path)
    with pytest.raises(DLSError, match="No such file"):
        read_run(tmp_path / "none")
