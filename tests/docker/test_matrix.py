"""Running the matrix, with a false engine: everything but the minutes of building."""

import contextlib
import io
import json
import signal
import sys
import time
from pathlib import Path

import pytest
import yaml

DOCKER = Path(__file__).parents[2] / "docker"

ENTRIES = list(yaml.safe_load((DOCKER / "docker-compose.test.yml").read_text())["services"])


# Entries ------------------------------------------------------------------------------------------


class FakeEngine:
    """Builds nothing and runs Python programs on this machine."""

    name, environ = "fake", {}

    def __init__(self, build="print('STEP 1')", run="print('=== 7 passed, 2 skipped in 1.5s ===')"):
        self.programs = {"build": build, "run": run}

    def has_image(self, name):
        return True

    def build(self, image, build, arguments, settings):
        return [sys.executable, "-c", self.programs["build"]]

    def run(self, image, command, environ):
        return contextlib.nullcontext([sys.executable, "-c", self.programs["run"]])

    def size(self, image):
        return 1_500_000_000


def run(matrix, tmp_path, engine):
    entry = next(iter(matrix.read().values()))
    runner = matrix.Matrix(engine, tmp_path, matrix.Line(io.StringIO()))
    result = runner.run(entry, tmp_path)
    return result, (tmp_path / "logs" / f"{entry.name}.log").read_text()


def test_an_entry_that_passes(matrix, tmp_path):
    result, log = run(matrix, tmp_path, FakeEngine())
    assert (result.outcome, result.tests_passed, result.tests_skipped) == ("passed", 7, 2)
    assert (result.image_bytes, result.engine) == (1_500_000_000, "fake")
    assert "STEP 1" in log
    assert "7 passed" in log


@pytest.mark.parametrize(
    ("engine", "reason", "passed"),
    [
        ({"build": "import sys; print('no space'); sys.exit(3)"}, "ended with 3", 0),
        ({"run": "print('== 1 failed, 4 passed in 3.00s =='); raise SystemExit(1)"}, "with 1", 4),
        ({"run": "print('== no tests ran in 0.1s ==')"}, "no test passed", 0),
    ],
)
def test_an_entry_that_fails(matrix, tmp_path, engine, reason, passed):
    result, _ = run(matrix, tmp_path, FakeEngine(**engine))
    assert result.outcome == "failed"
    assert reason in result.reason
    assert result.tests_passed == passed


def test_an_entry_that_hangs_is_ended(matrix, tmp_path, monkeypatch):
    monkeypatch.setattr(matrix, "TEST_LIMIT", 0.5)
    program = "import subprocess, time; subprocess.Popen(['sleep', '3600']); time.sleep(3600)"
    begin = time.monotonic()
    result, _ = run(matrix, tmp_path, FakeEngine(run=program))
    assert time.monotonic() - begin < 600
    assert result.outcome == "failed"
    assert "not done after" in result.reason


def test_too_little_disk_is_a_reason_to_skip(matrix, tmp_path, monkeypatch):
    monkeypatch.setattr(matrix, "DISK_NEEDED", 10**18)
    result, _ = run(matrix, tmp_path, FakeEngine())
    assert result.outcome == "skipped"
    assert "disk" in result.reason


def test_no_base_and_no_debootstrap_is_a_reason_to_skip(matrix, engines, tmp_path, monkeypatch):
    class Offline(FakeEngine):
        def has_image(self, name):
            return False

        def pull(self, name):
            raise engines.EngineError("no such host")

    monkeypatch.setattr(matrix.shutil, "which", lambda name: None)
    result, _ = run(matrix, tmp_path, Offline())
    assert result.outcome == "skipped"
    assert "debootstrap" in result.reason


# The command --------------------------------------------------------------------------------------


@pytest.fixture
def command(matrix, tmp_path, monkeypatch):
    """main() with a false engine, its own cache and its own results."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(matrix, "obtain_engine", lambda *_: FakeEngine())
    monkeypatch.setattr(matrix.machine, "write", lambda folder, _: folder)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    return matrix.main


def test_list_names_the_entries(command, capsys):
    assert command(["--list"]) == 0
    assert capsys.readouterr().out.split() == ENTRIES


def test_an_unknown_entry_is_a_usage_error(command, capsys):
    with pytest.raises(SystemExit):
        command(["test-gpu"])
    assert "test-gpu" in capsys.readouterr().err


def test_all_entries_end_in_a_table_that_is_written(command, tmp_path, capsys):
    document = tmp_path / "docker.md"
    document.write_text("before\n<!-- matrix: begin -->\nold\n<!-- matrix: end -->\nafter\n")
    assert command([ENTRIES[0], "--write", str(document)]) == 0
    assert capsys.readouterr().out.count(" passed ") >= 1
    text = document.read_text()
    assert text.startswith("before\n<!-- matrix: begin -->\n| entry")
    assert text.endswith("|\n<!-- matrix: end -->\nafter\n")
    assert "old" not in text
    assert text.count("not run yet") == len(ENTRIES) - 1


def test_resume_runs_again_only_what_changed_or_did_not_pass(
    command, matrix, tmp_path, monkeypatch
):
    ran = []
    run = matrix.Matrix.run
    monkeypatch.setattr(matrix, "fingerprint", lambda entry, root: "of this source")
    monkeypatch.setattr(
        matrix.Matrix, "run", lambda self, entry, s: ran.append(entry.name) or run(self, entry, s)
    )
    command(ENTRIES[:2])
    results = tmp_path / "hvd_dls" / "matrix" / "results.json"
    kept = json.loads(results.read_text())
    kept[ENTRIES[1]]["fingerprint"] = "of another source"
    results.write_text(json.dumps(kept))
    ran.clear()
    assert command([*ENTRIES[:3], "--resume"]) == 0
    assert ran == ENTRIES[1:3]


def test_a_fingerprint_is_of_what_goes_into_the_image(matrix, tmp_path):
    entries = list(matrix.read().values())
    (tmp_path / "hvd_dls").mkdir()
    (tmp_path / "docs").mkdir()
    empty = matrix.fingerprint(entries[0], tmp_path)
    assert empty != matrix.fingerprint(entries[1], tmp_path)
    (tmp_path / "docs" / "docker.md").write_text("text")
    (tmp_path / "hvd_dls" / "__pycache__").mkdir()
    (tmp_path / "hvd_dls" / "__pycache__" / "a.pyc").write_text("compiled")
    assert empty == matrix.fingerprint(entries[0], tmp_path)
    (tmp_path / "hvd_dls" / "a.py").write_text("code")
    assert empty != matrix.fingerprint(entries[0], tmp_path)


def test_without_an_engine_entries_are_skipped(command, matrix, engines, monkeypatch, capsys):
    def none(*_):
        raise engines.EngineError("docker is not installed")

    monkeypatch.setattr(matrix, "obtain_engine", none)
    assert command([ENTRIES[0]]) == 0
    assert "skipped: no engine: docker is not installed" in capsys.readouterr().out
    assert command([ENTRIES[0], "--strict"]) == 1


def test_a_failed_entry_is_a_failed_command(command, matrix, monkeypatch):
    monkeypatch.setattr(matrix, "obtain_engine", lambda *_: FakeEngine(run="raise SystemExit(1)"))
    assert command([ENTRIES[0]]) == 1
