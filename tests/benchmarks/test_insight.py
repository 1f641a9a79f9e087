"""The benchmark of what statistics and logs cost, on two ranks."""

from __future__ import annotations

import json

from tests.benchmarks.running import run
from tests.jobs import needs


@needs("torch", "horovod")
def test_each_kind_of_turn_is_measured_in_every_round(tmp_path):
    path = tmp_path / "insight.json"
    short = ["--rounds", "2", "--steps", "3", "--warmup", "3", "--times", "3"]
    printed = run("-m", "benchmarks.insight", "--models", "tiny", *short, "--json", str(path))
    assert "tiny, 6 tensors" in printed
    (job,) = json.loads(path.read_text())
    assert len(job["medians"]) == 3
    assert all(len(medians) == 2 and min(medians) > 0 for medians in job["medians"].values())
