"""The cost model: its fit and its predictions."""

from __future__ import annotations

import itertools
import json
import math
import re

import numpy as np
import pytest

from benchmarks.cost_model import fit, predictions
from tests.benchmarks.running import PNG, run
from tests.jobs import needs


@needs("torch", "horovod")
def test_the_cost_model_reads_measurements_and_draws(exchange_file, tmp_path):
    options = ["--model", "resnet50", "--ranks", "16", "1024", "--picture", str(tmp_path / "c.png")]
    output = run("-m", "benchmarks.cost_model", str(exchange_file), *options)
    assert re.search(r"^Errors: median \d+%", output, re.M)
    # A hundredth of the entries from 1024 ranks is ten times the model.
    assert "Loses on every link against an ideal allreduce: 1024 ranks at 0.01, allgather" in output
    assert (tmp_path / "c.png").read_bytes().startswith(PNG)


def test_the_cost_models_fit_finds_the_terms_that_made_the_times():
    terms = np.array([0.01, 0.001, 0.002, 0.003, 4e-9, 2e-9, 1.5e-9, 1e-8, 2e-8, 0.001, 1.05])
    assert len(terms) == len(fit.TERMS)
    points = []
    sizes = {"dense": (0, 1e8), "fp16": (0, 5e7), "dls:0.01": (2e5, 1e6), "dls:0.001": (2e4, 2e5)}
    sizes |= {"sparse_allreduce:0.01": (2e5, 2e6), "hierarchical:0.01": (2e5, 1e6)}
    sizes |= {"hierarchical_sparse_allreduce:0.01": (2e5, 5e5)}
    for ranks, bits, n in itertools.product((2, 4, 8), (1e8, 1e9, None), (10_000_000, 25_000_000)):
        for method, (k, sent) in sizes.items():
            averaging = 4 if method.startswith("hierarchical") else 1
            senders = fit.Senders(ranks, averaging, 0 if ":" not in method else n // 5_000_000)
            x = fit.factors_of(method, senders, n, k, sent, bits, ranks * averaging / 2)
            points.append(fit.Point("", ranks, method, float(x @ terms), x))
    np.testing.assert_allclose(fit.fit(points), terms, rtol=1e-6)


@pytest.mark.parametrize(
    ("method", "senders", "operations"),
    [
        ("dls:0.01", (16, 1, 1), 1),
        ("sparse_allreduce:0.01", (16, 1, 1), 3),
        ("hierarchical:0.01", (4, 4, 4), 12),
        ("hierarchical_sparse_allreduce:0.01", (4, 4, 4), 20),
    ],
)
def test_a_methods_operations_follow_from_hosts_and_buckets(method, senders, operations):
    found = fit.Senders.of(method, "mlp1m", hosts=4, per_host=4)
    assert found == senders
    assert found.operations("sparse_allreduce" in method) == operations


def test_hosts_of_several_ranks_are_read_and_can_be_kept_from_the_fit(exchange_file, tmp_path):
    job = json.loads(exchange_file.read_text())
    hosts = tmp_path / "hosts.json"
    ranks = {"ranks": 4, "hosts": 2, "rate": "100mbit"}
    methods = {"dense": job["methods"]["dense"], "hierarchical:0.01": job["methods"]["dls:0.05"]}
    hosts.write_text(json.dumps({"jobs": [job | ranks | {"methods": methods}]}))
    names = [point.name.rpartition("l, ")[2] for point in fit.points_of(hosts)]
    assert names == [f"{job['model']}, 2 hosts of 2 ranks, 100mbit"] * 2
    options = ["--ranks", "16", "--per-host", "4", "--density", "0.01", "--check", str(hosts)]
    output = run("-m", "benchmarks.cost_model", str(exchange_file), *options)
    assert re.search(r"^Errors of what is not fitted to: median \d+%", output, re.M)
    assert "| allgather, two levels |" in output


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
    dense, sparse = predictions.Costs(*dense), predictions.Costs(*sparse)
    assert predictions.crossover(dense, sparse) == pytest.approx((low, high))
    for bits in {low, high} - {0, math.inf}:
        assert dense.at(bits) == pytest.approx(sparse.at(bits))


def test_what_is_received_where_owners_add_up_hardly_grows_with_ranks_and_else_in_proportion():
    terms, latency = np.zeros(len(fit.TERMS)), 0.0
    gathered, owners = (
        predictions.config_of(0.01, "float32", exchange)
        for exchange in ("allgather", "sparse_allreduce")
    )
    few, many = (
        predictions.sparse_costs(terms, "mlp10m", owners, ranks, latency).wire_bits
        for ranks in (4, 64)
    )
    assert few < many < 2 * few
    few, many = (
        predictions.sparse_costs(terms, "mlp10m", gathered, ranks, latency).wire_bits
        for ranks in (4, 64)
    )
    assert many > 15 * few
