"""The synthetic benchmark, on two ranks."""

from __future__ import annotations

import json
import math
import re

import pytest

from benchmarks.common import shapes
from tests.benchmarks.running import PNG
from tests.jobs import horovodrun, needs


@needs("torch", "horovod")
def test_synthetic_prints_horovods_lines_and_the_split(tmp_path):
    result = tmp_path / "synthetic.json"
    options = ["--model", "tiny", "--compression", "dls", "--density", "0.05", "--spread", "10"]
    options += ["--num-warmup-batches", "2", "--num-batches-per-iter", "3", "--num-iters", "2"]
    options += ["--backward-ms", "3", "--json", str(result), "--picture", str(tmp_path / "x.png")]
    output = horovodrun(2, ["-m", "benchmarks.synthetic", *options])
    for line in (
        r"Model: tiny",
        r"Batch size: 32",
        r"Number of CPUs: 2",
        r"Iter #1: [\d.]+ img/sec per CPU",
        r"Img/sec per CPU: [\d.]+ \+-[\d.]+",
        r"Total img/sec on 2 CPU\(s\): [\d.]+ \+-[\d.]+",
        r"Steps in which no payload changed its length .*: \d+%",
    ):
        assert re.search(rf"{line}$", output, re.M), output
    figures = json.loads(result.read_text())
    assert sum(figures["split_ms"].values()) == pytest.approx(figures["step_ms"])
    assert figures["split_ms"]["rest (backward, optimizer)"] > 3  # --backward-ms
    assert {"find", "pack", "unpack", "settle"} <= figures["split_ms"].keys()
    vectors = 4 * sum(math.prod(s) for s in shapes.tiny().values() if len(s) == 1)
    assert figures["bytes"]["allreduce"] == vectors
    assert (tmp_path / "x.png").read_bytes().startswith(PNG)
