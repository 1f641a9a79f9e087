"""The wire benchmark, on a small layer, and the codes it compares with."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.common.internals import layer_spec
from benchmarks.wire import __main__ as wire
from benchmarks.wire import codes, measuring, owning, receiving
from benchmarks.wire.index_sets import resnet50_matrices


def test_wire_measures_a_small_layer(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(measuring, "SECONDS", 0.0)
    monkeypatch.setattr(wire, "DENSITIES", [1e-2])
    monkeypatch.setattr(wire, "digits_gradient", lambda: None)
    rows = wire.measure_all(["one layer, 100k"], seed=0)
    wire.show_bytes(rows)
    wire.show_times(rows)
    wire.draw(rows, tmp_path / "w.png")
    assert [row["set"] for row in rows] == ["uniform", "clustered"]
    assert "one layer, 100k" in capsys.readouterr().out


def test_what_an_entry_costs_that_comes_in(monkeypatch, capsys):
    monkeypatch.setattr(receiving, "ROUNDS", 2)
    layers = [layer_spec("one", (100, 40)), layer_spec("other", (30, 20))]
    row = receiving.measure_receiving(layers, 0.05, 3)
    assert row["entries"] == 3 * (200 + 30)
    wire.show_receiving([row])
    assert "| 0.05 | 3 | 690 |" in capsys.readouterr().out


def test_what_an_entry_costs_that_an_owner_receives(monkeypatch, capsys):
    monkeypatch.setattr(receiving, "ROUNDS", 2)
    layers = [layer_spec("one", (100, 40)), layer_spec("other", (30, 20))]
    row = owning.measure_owning(layers, 0.05, 3)
    assert row["entries"] == 3 * (230 // 3)
    wire.show_owning([row])
    assert "| 0.05 | 3 | 228 |" in capsys.readouterr().out


def test_codes_need_at_least_what_the_entropy_says():
    n, k = 100_000, 1_000
    positions = np.sort(np.random.default_rng(0).choice(n, k, replace=False))
    bound = codes.entropy_bound(n, k)
    assert codes.entropy_bound(4, 2) == pytest.approx(np.log2(6) / 2)  # 6 pairs
    assert bound < codes.golomb_rice(positions) < bound + 0.2
    assert codes.u16_blocks(n, k) == 16 + 32 * 2 / k


def test_resnet50_has_its_convolutions_and_its_classifier():
    layers = resnet50_matrices()
    assert (len(layers), sum(layer.size for layer in layers)) == (54, 25_502_912)
