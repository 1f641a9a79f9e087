"""The exchange benchmark, on two ranks."""

from __future__ import annotations

import json

from benchmarks.common import shapes
from tests.jobs import needs


@needs("torch", "horovod")
def test_exchange_measures_every_method_in_every_round(exchange_file):
    job = json.loads(exchange_file.read_text())
    assert list(job["methods"]) == ["nothing", "dense", "fp16", "dls:0.05"]
    for figures in job["methods"].values():
        assert len(figures["turns"]) == 2
        assert all(min(turn["seconds"]) > 0 for turn in figures["turns"])
    dense, fp16, dls = (job["methods"][m]["claimed_wire_bytes"] for m in list(job["methods"])[1:])
    assert dense == 2 * fp16 == 4 * shapes.entries(shapes.tiny())  # two ranks: each sends it once
    assert dls < fp16
