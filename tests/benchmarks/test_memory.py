"""The memory benchmark, with a tiny model."""

from __future__ import annotations

import argparse

from benchmarks import memory
from tests.benchmarks.running import PNG
from tests.jobs import needs


@needs("torch", "horovod")
def test_the_peak_of_a_job_is_measured_and_shown(capsys, tmp_path):
    figures = memory.measure("tiny", "DLS, 1 %", argparse.Namespace(ranks=2, steps=2))
    assert figures["peak_megabytes"] > 50  # Python and torch alone
    assert figures["options"]["compression"] == "dls"
    found = {"dense": figures, "DLS, 1 %": figures | {"peak_megabytes": 50.0}}
    memory.show("tiny", found)
    shown = capsys.readouterr().out
    assert "tiny: 18,024 entries, gradients of 0 MB" in shown
    assert "| DLS, 1 % | 50 MB | -" in shown
    memory.draw({"tiny": found}, tmp_path / "m.png")
    assert (tmp_path / "m.png").read_bytes().startswith(PNG)
