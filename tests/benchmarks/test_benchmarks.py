"""The benchmarks themselves, at tiny sizes: that they run and that what they show adds up.

How fast anything is, is nobody's business here.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import cost_model, wire
from benchmarks.common import shapes
from benchmarks.hosts import jobs, why_not
from tests.jobs import JOB, ROOT, horovodrun, needs

needs_hosts = pytest.mark.skipif(
    why_not() is not None, reason=f"no hosts can be made here: {why_not()}"
)

PNG = b"\x89PNG"
QUICK = ["--model", "tiny", "--rounds", "2", "--turn-seconds", "0.02", "--warmup", "3"]


def run(*command: str) -> str:
    """Runs a script of ours to its end; what it printed."""
    job = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=JOB,
    )
    assert job.returncode == 0, job.stdout + job.stderr
    return job.stdout


# Shapes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "tensors", "entries"),
    [
        ("resnet50", 161, 25_557_032),  # torchvision's resnet50
        ("vgg16", 32, 138_357_544),  # torchvision's vgg16
        ("bert-base", 199, 109_482_240),  # Hugging Face's bert-base-uncased
        ("lstm", 11, 66_034_000),  # torch's word language model, 2 x 1500, 10,000 words
        ("mlp10m", 12, 10_664_458),
    ],
)
def test_shapes_have_as_many_parameters_as_the_model_they_are_of(model, tensors, entries):
    made = shapes.MODELS[model]()
    assert (len(made), shapes.entries(made)) == (tensors, entries)


@needs("torch")
def test_shapes_are_those_of_torchs_own_layers():
    import torch

    lstm = torch.nn.LSTM(1500, 1500, 2, device="meta")
    expected = {f"rnn.{name}": tuple(p.shape) for name, p in lstm.named_parameters()}
    made = shapes.lstm()
    assert {name: made[name] for name in made if name.startswith("rnn.")} == expected


# The synthetic model ------------------------------------------------------------------------------

DELIVERY = """
import numpy as np, torch
from benchmarks.common.shapes import tiny
from benchmarks.common.synthetic_model import Gradients, Stopwatch, SyntheticModel

shapes = tiny()
gradients = Gradients(shapes, seed=3, pool=1000)  # smaller than a layer: drawn in parts
drawn = []
def draw(position):
    drawn.append(position)
    return gradients.draw(position)
model = SyntheticModel(shapes, draw)
model().backward()
assert drawn == list(reversed(range(len(shapes)))), drawn
for (name, parameter), tensor in zip(model.named_parameters(), gradients.tensors):
    assert parameter.grad.data_ptr() == tensor.data_ptr(), f"{name} was copied"
    assert tuple(parameter.shape) == shapes[name] and parameter.grad.abs().min() > 0

before = [tensor.clone() for tensor in gradients.tensors]
gradients.draw_all()
assert not any(torch.equal(a, b) for a, b in zip(before, gradients.tensors))
scales = [tensor.std().item() for tensor in gradients.tensors]
others = Gradients(shapes, seed=4)
others.draw_all()
assert 5 < max(scales) / min(scales) < 200
for scale, other in zip(scales, others.tensors):  # other noise of the same scale
    assert 0.5 < scale / other.std().item() < 2

stand_in = SyntheticModel(shapes, gradients.as_drawn, stand_in=True)
stand_in().backward()
for (_, parameter), tensor in zip(stand_in.named_parameters(), gradients.tensors):
    assert parameter.untyped_storage().nbytes() == 4
    assert parameter.grad.data_ptr() == tensor.data_ptr()
"""


@needs("torch", "horovod")
def test_the_models_gradients_arrive_last_layer_first_and_uncopied():
    run("-c", DELIVERY)


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


# Measured and modelled ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exchange_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exchange")
    files = ["--json", f"{folder}/x.json", "--picture", f"{folder}/x.png"]
    methods = ["--methods", "dls:0.05", "--profile-steps", "2"]
    output = run("-m", "benchmarks.exchange", *QUICK, *methods, *files)
    assert "| DLS, 5.0% |" in output
    assert "Where a step with DLS, 5.0% goes" in output
    assert (folder / "x.png").read_bytes().startswith(PNG)
    return folder / "x.json"


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


@needs_hosts
@needs("torch", "horovod")
def test_network_counts_what_telemetry_claims_and_headers(tmp_path):
    files = ["--json", str(tmp_path / "n.json"), "--picture", str(tmp_path / "n.png")]
    options = ["--hosts", "2", "--rates", "1gbit", "--density", "0.05", *files]
    output = run("-m", "benchmarks.network", *QUICK, *options)
    assert "2 hosts, 1gbit: tiny" in output
    (job,) = json.loads((tmp_path / "n.json").read_text())["jobs"]
    assert [row["method"] for row in job["rows"]][3:] == [
        "layerwise:0.05",
        "dls:0.05",
        "dls:0.05:bfloat16",
    ]
    for row in job["rows"]:
        assert row["counted_bytes"] > row["claimed_bytes"]
    assert (tmp_path / "n.png").read_bytes().startswith(PNG)


@needs("torch", "horovod")
def test_the_cost_model_reads_measurements_and_draws(exchange_file, tmp_path):
    options = ["--model", "resnet50", "--ranks", "16", "1024", "--picture", str(tmp_path / "c.png")]
    output = run("-m", "benchmarks.cost_model", str(exchange_file), *options)
    assert re.search(r"^Errors: median \d+%", output, re.M)
    # A hundredth of the entries from 1024 ranks is ten times the model.
    assert "Loses on every link against an ideal allreduce: 1024 ranks at 0.01" in output
    assert (tmp_path / "c.png").read_bytes().startswith(PNG)


def test_the_cost_models_fit_finds_the_terms_that_made_the_times():
    terms = np.array([0.01, 0.002, 4e-9, 2e-9, 1.5e-9, 1e-8, 1.05])
    points = []
    sizes = {"dense": (0, 1e8), "fp16": (0, 5e7), "dls:0.01": (2e5, 1e6), "dls:0.001": (2e4, 2e5)}
    for ranks, bits, n in itertools.product((2, 4, 8), (1e8, 1e9, None), (10_000_000, 25_000_000)):
        for method, (k, sent) in sizes.items():
            x = cost_model.terms_of(method, ranks, n, k, sent, bits, ranks / 2)
            points.append(cost_model.Point("", ranks, method, float(x @ terms), x))
    np.testing.assert_allclose(cost_model.fit(points), terms, rtol=1e-6)


@pytest.mark.parametrize(
    ("dense", "sparse", "low", "high"),
    [
        ((0.0, 8e8), (0.05, 1e8), 0, 1.4e10),  # less to send, more to do: up to some speed
        ((0.1, 8e8), (0.05, 1e8), 0, math.inf),  # less of both
        ((0.0, 8e8), (0.05, 9e8), math.inf, math.inf),  # more of both
        ((0.1, 8e8), (0.05, 9e8), 2e9, math.inf),  # more to send, less to do
    ],
)
def test_the_crossover_is_where_both_take_as_long(dense, sparse, low, high):
    dense, sparse = cost_model.Costs(*dense), cost_model.Costs(*sparse)
    assert cost_model.crossover(dense, sparse) == pytest.approx((low, high))
    for bits in {low, high} - {0, math.inf}:
        assert dense.at(bits) == pytest.approx(sparse.at(bits))


def test_ratios_are_of_one_round_each():
    def turns(*seconds):
        return {"turns": [{"seconds": [s]} for s in seconds]}

    job = {
        "methods": {"dense": turns(8, 10, 30), "dls:0.01": turns(2, 1, 2), "off": turns(1, 0, 0)}
    }
    assert jobs.ratio(job, "dls:0.01") == [4, 10, 15]
    assert jobs.ratio(job, "dls:0.01", without="off") == [7, 10, 15]


def test_wire_measures_a_small_layer(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(wire, "SECONDS", 0.0)
    monkeypatch.setattr(wire, "DENSITIES", [1e-2])
    monkeypatch.setattr(wire, "digits_gradient", lambda: None)
    rows = wire.measure_all(["one layer, 100k"], seed=0)
    wire.show_bytes(rows)
    wire.show_times(rows)
    wire.draw(rows, tmp_path / "w.png")
    assert [row["set"] for row in rows] == ["uniform", "clustered"]
    assert "one layer, 100k" in capsys.readouterr().out
