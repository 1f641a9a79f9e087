"""The benchmark of what join costs, on two ranks."""

from __future__ import annotations

import json

from tests.benchmarks.running import run
from tests.jobs import needs


@needs("torch", "horovod")
def test_steps_with_and_without_the_block_are_measured_in_every_round(tmp_path):
    path = tmp_path / "join.json"
    short = ["--rounds", "2", "--steps", "3", "--warmup", "3"]
    printed = run("-m", "benchmarks.join", "--models", "tiny", *short, "--json", str(path))
    assert "tiny, 6 tensors" in printed
    (job,) = json.loads(path.read_text())
    assert set(job["medians"]) == {"without", "within join"}
    assert all(len(medians) == 2 and min(medians) > 0 for medians in job["medians"].values())
    assert min(job["around"]) > 0
