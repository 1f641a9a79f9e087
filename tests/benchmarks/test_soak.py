"""The long training, shortened, with more happening in it."""

from __future__ import annotations

import json

import pytest

from benchmarks.soak.__main__ import main
from benchmarks.soak.events import Event
from tests.jobs import needs


@needs("torch", "horovod")
def test_all_is_accounted_for_whatever_happens(tmp_path, capsys):
    figures = tmp_path / "figures.json"
    options = ["--ranks=2", "--steps=150", "--look-every=30", "--often=15", f"--json={figures}"]
    assert main(options) == 0, capsys.readouterr().err
    found = json.loads(figures.read_text())
    assert all(found["counts"][event.value] for event in Event), found["counts"]
    assert [look["step"] for look in found["looks"]] == [30, 60, 90, 120, 150]
    assert "to the bit" in capsys.readouterr().out


def test_sums_must_be_exact(capsys):
    with pytest.raises(SystemExit):
        main(["--ranks=3"])
    assert "2, 4, 8" in capsys.readouterr().err
