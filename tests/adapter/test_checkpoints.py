"""Checkpoints of several ranks: complete or not there, wherever something goes wrong."""

import itertools
import json
import os
import shutil
import signal
import sys
from unittest import mock

import numpy as np
import pytest
from horovod.common.elastic import run_fn

from hvd_dls import CheckpointError, DLSError, StateMismatchError
from hvd_dls.adapter.compressor import BaseCompressor
from hvd_dls.adapter.loading import find
from hvd_dls.adapter.saving import save
from hvd_dls.core.balancing.layers import layer_spec
from tests.adapter.threads import compressor_of, on_ranks
from tests.core.ranks import make_sessions, run

LAYERS = [layer_spec("conv.weight", (8, 4, 3, 3)), layer_spec("fc.weight", (20, 30))]
OPTIONS = {
    "dense_below": 0,
    "density": 0.05,
    "momentum": 0.5,
    "cost_rule": False,
    "prior": "uniform",
}


@pytest.fixture(scope="module")
def sessions():
    trained = make_sessions(2, LAYERS, **OPTIONS)
    run(trained, np.random.default_rng(0), 3)
    return trained


def save_all(path, sessions, text="state", keep=2):
    """Each rank saves; path may be a function of the rank."""

    def action(together):
        own = path(together.rank) if callable(path) else path
        compressor = compressor_of(sessions[together.rank])
        return save(own, together, compressor, lambda f: (f / "state.txt").write_text(text), keep)

    return on_ranks(len(sessions), action)


def find_all(path, size=2, missing="refuse", **options):
    def action(together):
        own = path(together.rank) if callable(path) else path
        return find(own, together, BaseCompressor(**OPTIONS | options), missing)

    return on_ranks(size, action)


def text_of(found):
    """What rank 0 saved, as each rank sees it."""
    (text,) = {(f.folder / "state.txt").read_text() for f in found}
    return text


def assert_same(state, session):
    (model,) = state["models"]
    for part in ("residuals", "velocities"):
        for name, array in session.memory.state()[part].items():
            assert np.asarray(model[part][name]).tobytes() == array.tobytes()


def test_each_rank_finds_its_part_and_rank_0s_state(tmp_path, sessions):
    assert find_all(tmp_path / "new") == [None, None]
    folders = save_all(tmp_path, sessions, "one")
    assert folders == [tmp_path / "checkpoint-00000000"] * 2
    save_all(tmp_path, sessions, "two")
    found = find_all(tmp_path)
    assert text_of(found) == "two"
    for one, session in zip(found, sessions, strict=True):
        assert_same(one.state, session)
    assert text_of(find_all(folders[0])) == "one"  # by name
    save_all(tmp_path, sessions, "three", keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-00000002"]


def test_a_part_is_an_ordinary_npz_that_says_what_it_is(tmp_path, sessions):
    (folder, _) = save_all(tmp_path, sessions)
    part = np.load(folder / "rank-00001-of-00002.npz")  # refuses pickles
    header = json.loads(part["header"].tobytes())
    assert (header["rank"], header["ranks"], header["format"]) == (1, 2, 1)
    assert header["models"][0]["config"]["density"] == 0.05
    assert header["models"][0]["parameters"] == [[x.name, list(x.shape)] for x in LAYERS]
    assert np.array_equal(part["0/residuals/fc.weight"], sessions[1].residuals["fc.weight"])


# Ends of a job -----------------------------------------------------------------------------------

_EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.listdir", "os.scandir"}


def killed_at(number, folder, action):
    """Runs in a process of its own that is killed before its number-th use of a folder's files.

    Returns:
        Whether it was.
    """
    child = os.fork()
    if child == 0:
        seen = itertools.count()

        def kill(event, arguments):
            about = [a for a in arguments if isinstance(a, (str, os.PathLike))]
            if (
                event in _EVENTS
                and any(os.fspath(a).startswith(os.fspath(folder)) for a in about)
                and next(seen) == number
            ):
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(kill)
        try:
            action()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_a_kill_at_any_moment_leaves_the_old_checkpoint_or_the_new_one(tmp_path, sessions):
    """At each use of a file; whatever is left behind, the next save goes through and tidies up."""
    save_all(tmp_path / "0", sessions, "old")
    save_all(tmp_path / "0", sessions, "old")
    seen = set()
    for number in itertools.count():
        path = tmp_path / str(number + 1)
        shutil.copytree(tmp_path / "0", path)
        if not killed_at(number, path, lambda path=path: save_all(path, sessions, "new")):
            break
        found = find_all(path)
        seen.add(text_of(found))
        for one, session in zip(found, sessions, strict=True):
            assert_same(one.state, session)
        save_all(path, sessions, "newer")
        assert text_of(find_all(path)) == "newer"
        assert len(list(path.iterdir())) == 2
    assert number > 15
    assert seen == {"old", "new"}


def test_a_file_that_is_cut_short_by_a_kill_does_not_count(tmp_path, sessions):
    save_all(tmp_path, sessions, "old")
    (folder, _) = save_all(tmp_path, sessions, "new")
    (folder / "manifest.json").rename(folder / "manifest.json.unfinished")
    part = folder / "rank-00001-of-00002.npz"
    part.write_bytes(part.read_bytes()[:100])
    assert text_of(find_all(tmp_path)) == "old"


# What cannot be written ---------------------------------------------------------------------------


def assert_all_raise(outcomes, *words, kind=CheckpointError):
    assert len({str(outcome) for outcome in outcomes}) == 1, outcomes
    for outcome in outcomes:
        assert isinstance(outcome, kind), outcomes
        assert all(word in str(outcome) for word in words), outcome


def test_if_one_rank_cannot_write_all_raise_and_the_old_checkpoint_stays(tmp_path, sessions):
    def path(rank):
        return tmp_path / f"disk{rank}"

    save_all(path, sessions, "old")
    (path(1) / "checkpoint-00000001").write_text("in the way")
    outcomes = save_all(path, sessions, "new")
    assert_all_raise(outcomes, "rank 1: FileExistsError", "those that were there still are")
    assert text_of(find_all(path)) == "old"
    assert len(list(path(0).iterdir())) == 1


def test_an_unusable_state_or_argument_is_refused_by_all(tmp_path, sessions):
    def with_options(**options):
        def action(together):
            own = compressor_of(sessions[together.rank])
            arguments = {"path": tmp_path, "compression": own, "keep": 2} | options
            arguments["write_state"] = options.get("write_state", lambda folder: None)
            return save(together=together, **arguments)

        return on_ranks(2, action)

    assert_all_raise(with_options(keep=0), "keep=0: accepted is an integer >= 1", kind=DLSError)
    assert_all_raise(with_options(compression="dls"), "compression='dls'", kind=DLSError)
    single = tmp_path / "checkpoint-00000003"
    assert_all_raise(with_options(path=single), "a single checkpoint's folder", kind=DLSError)

    def fails(folder):
        raise OSError(28, "No space left on device")

    assert_all_raise(with_options(write_state=fails), "rank 0: OSError", "No space left")
    assert list(tmp_path.iterdir()) == []
    save_all(tmp_path, sessions, "old")
    assert_all_raise(with_options(write_state=fails), "rank 0: OSError", "No space left")
    assert text_of(find_all(tmp_path)) == "old"


def test_ranks_in_different_steps_are_refused(tmp_path, sessions):
    later = make_sessions(2, LAYERS, **OPTIONS)
    run(later, np.random.default_rng(0), 4)
    outcomes = save_all(tmp_path, [sessions[0], later[1]])
    assert_all_raise(outcomes, "step [3] on rank 0", "[4] on rank 1", kind=DLSError)


def test_a_rank_that_passes_no_compressor_is_refused_by_all(tmp_path, sessions):
    def mixed(together):
        compressor = compressor_of(sessions[0]) if together.rank == 0 else None
        return save(tmp_path, together, compressor, lambda folder: None, 2)

    assert_all_raise(on_ranks(2, mixed), "compression=None on rank 1", kind=DLSError)
    save_all(tmp_path, sessions)
    choices = [None, BaseCompressor(**OPTIONS)]
    outcomes = on_ranks(2, lambda together: find(tmp_path, together, choices[together.rank]))
    assert_all_raise(outcomes, "compression=None on rank 0", kind=DLSError)


# What cannot be read ------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_by_all(tmp_path, sessions):
    save_all(tmp_path, sessions)
    outcomes = find_all(tmp_path, density=0.1)
    assert_all_raise(outcomes, "density=0.05, but it is 0.1 now", kind=StateMismatchError)
    for option in ({"strategy": "layerwise"}, {"momentum": 0.9}, {"momentum_masking": False}):
        assert_all_raise(find_all(tmp_path, **option), *option, kind=StateMismatchError)
    assert_all_raise(find_all(tmp_path, missing="maybe"), "missing='maybe'", kind=DLSError)
    unknown = tmp_path / "checkpoint-00000099"
    assert_all_raise(find_all(unknown), "no complete checkpoint")


def test_a_load_that_a_newcomer_would_wait_in_is_told(tmp_path, monkeypatch, caplog):
    """Outside of ``hvd.elastic.run``, where a worker that comes later is alone."""

    def load(together):
        found.append(find(tmp_path, together, None))

    def load_in_run(together):
        with mock.patch("horovod.common.elastic.notification_manager"):
            run_fn(lambda state: load(together), None)(mock.Mock())

    found = []
    on_ranks(1, load)
    monkeypatch.setenv("HOROVOD_ELASTIC", "1")
    on_ranks(1, load_in_run)
    assert not caplog.records
    on_ranks(1, load)
    assert ["outside of hvd.elastic.run" in record.message for record in caplog.records] == [True]
    assert found == [None] * 3


def test_damage_is_found_wherever_it_is(tmp_path, sessions):
    save_all(tmp_path, sessions)
    (folder, _) = save_all(tmp_path, sessions)
    part = folder / "rank-00001-of-00002.npz"
    good, rng = part.read_bytes(), np.random.default_rng(3)
    for place in rng.integers(0, len(good), 40):
        bad = bytearray(good)
        bad[place] ^= 0x10
        part.write_bytes(bad)
        for outcome in (outcomes := find_all(tmp_path)):
            if isinstance(outcome, Exception):
                assert_all_raise(outcomes, "rank 1: ", part.name)
        if not isinstance(outcomes[1], Exception):  # of fields that nobody reads, as dates
            assert_same(outcomes[1].state, sessions[1])
    part.write_bytes(good[:-200])
    assert_all_raise(find_all(tmp_path), "rank 1: ", part.name)
    shutil.copy(folder.parent / "checkpoint-00000000" / part.name, part)
    assert_all_raise(find_all(tmp_path), part.name, "belongs to another checkpoint")
    shutil.copy(folder / "rank-00000-of-00002.npz", part)
    assert_all_raise(find_all(tmp_path), part.name, "has rank 0, expected 1")
    np.savez(part, header=np.array("{}", object))  # a pickle
    assert_all_raise(find_all(tmp_path), part.name, "cannot be read")
    (folder / "manifest.json").write_text("{")
    assert_all_raise(find_all(tmp_path), "manifest.json cannot be read")
    (folder / "manifest.json").write_text('{"format": 99}')
    assert_all_raise(find_all(tmp_path), "manifest.json has format 99")


# Disks --------------------------------------------------------------------------------------------


def test_ranks_with_disks_of_their_own(tmp_path, sessions):
    def path(rank):
        return tmp_path / f"disk{rank}"

    for text in ("one", "two", "three"):
        save_all(path, sessions, text)
    assert len(list(path(1).iterdir())) == 2
    found = find_all(path)
    assert text_of(found) == "three"  # a copy, where it was not
    for one, session in zip(found, sessions, strict=True):
        assert_same(one.state, session)
    # With another number of ranks each needs parts of others.
    outcomes = find_all(path, size=1)
    assert_all_raise(outcomes, "rank-00001-of-00002.npz is missing", "missing='zeros'")


def test_a_part_that_is_missing_is_refused_or_counts_as_zeros(tmp_path, sessions):
    (folder, _) = save_all(tmp_path, sessions)
    (folder / "rank-00001-of-00002.npz").unlink()
    assert_all_raise(find_all(tmp_path), "rank 1: ", "rank-00001-of-00002.npz is missing")
    found = find_all(tmp_path, missing="zeros")
    assert_same(found[0].state, sessions[0])
    new = make_sessions(2, LAYERS, **OPTIONS)
    for session, one in zip(new, found, strict=True):
        session.load_state_dict(one.state["models"][0])
    assert not any(residual.any() for residual in new[1].residuals.values())
    assert new[0].agreed().tolist() == new[1].agreed().tolist()
    run(new, np.random.default_rng(1), 2)
    (three, *_) = find_all(tmp_path, size=3, missing="zeros")
    expected = sessions[0].residuals["fc.weight"]
    assert np.array_equal(three.state["models"][0]["residuals"]["fc.weight"], expected)


def test_more_and_fewer_ranks(tmp_path, sessions):
    save_all(tmp_path, sessions)
    waited = sum(s.residuals["fc.weight"].astype(float) for s in sessions) / 2
    for size in (1, 3, 5):
        found = find_all(tmp_path, size)
        assert text_of(found) == "state"
        states = [one.state["models"][0] for one in found]
        mean = sum(s["residuals"]["fc.weight"].astype(float) for s in states) / size
        np.testing.assert_allclose(mean, waited, rtol=1e-6)
        if size > 1:
            new = make_sessions(size, LAYERS, **OPTIONS)
            for session, state in zip(new, states, strict=True):
                session.load_state_dict(state)
            run(new, np.random.default_rng(1), 2)


def test_saved_without_compression_and_loaded_with_it_and_the_reverse(tmp_path, sessions):
    def write(folder):
        (folder / "state.txt").write_text("plain")

    on_ranks(2, lambda together: save(tmp_path, together, None, write, 2))
    found = find_all(tmp_path)
    assert text_of(found) == "plain"
    assert [one.state for one in found] == [None, None]
    save_all(tmp_path, sessions)
    found = on_ranks(2, lambda together: find(tmp_path, together, None))
    assert [one.state for one in found] == [None, None]
