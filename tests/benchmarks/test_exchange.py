"""The exchange benchmark, on two ranks."""

from __future__ import annotations

import json

import pytest

from benchmarks.common import shapes
from benchmarks.common.method import Method
from hvd_dls.config import DLSConfig
from tests.benchmarks.running import QUICK, run
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


@needs("tensorflow", "horovod")
def test_steps_of_a_tape_are_measured_alike(tmp_path):
    file = tmp_path / "x.json"
    options = ["--framework", "tensorflow", "--profile-steps", "0", "--methods", "dls:0.05"]
    output = run("-m", "benchmarks.exchange", *QUICK, *options, "--json", str(file))
    assert "2 ranks, loopback, tensorflow" in output
    assert "| DLS, 5.0% |" in output
    methods = json.loads(file.read_text())["methods"]
    assert list(methods) == ["nothing", "dense", "fp16", "dls:0.05"]
    dense, fp16, dls = (methods[name]["claimed_wire_bytes"] for name in list(methods)[1:])
    assert dense == 2 * fp16 == 4 * shapes.entries(shapes.tiny())
    assert dls < fp16
    assert all(len(figures["turns"]) == 2 for figures in methods.values())


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("dense", {}),
        ("dls:0.01:bfloat16", {"values": "bfloat16"}),
        ("layerwise:0.01", {"strategy": "layerwise"}),
        ("hierarchical:0.01", {"hierarchical": True}),
        ("sparse_allreduce:0.01", {"exchange": "sparse_allreduce"}),
        (
            "hierarchical_sparse_allreduce:0.01",
            {"exchange": "sparse_allreduce", "hierarchical": True},
        ),
    ],
)
def test_a_methods_options_are_those_of_its_name(method, options):
    parsed = Method.parse(method)
    assert parsed.name == method
    if parsed.density is not None:
        assert DLSConfig(**parsed.options) == DLSConfig(density=0.01, **options)
