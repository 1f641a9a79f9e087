"""The selection benchmark, on small layers."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.benchmarks.running import PNG, run
from tests.jobs import needs

pytestmark = [needs("torch"), needs("sklearn")]


@pytest.mark.parametrize("data", ["normal", "heavy"])
def test_exact_methods_do_the_same_step(data):
    from benchmarks.selection.cases import DATA
    from benchmarks.selection.methods import FLOOR, all_methods

    case = DATA[data](2_000)
    expected = None
    for name, method in all_methods(last_threshold=0.5, count=2).items():
        if name in (FLOOR, "DGC's sample"):  # which selects nothing; only about as much
            continue
        residual, gradient = case.residual.copy(), case.gradient.copy()
        for _ in method(residual, gradient, 20):
            pass
        assert np.count_nonzero(gradient) == np.count_nonzero(residual == 0) == 20, name
        if expected is None:
            expected = residual, gradient
        np.testing.assert_array_equal(residual, expected[0], err_msg=name)
        np.testing.assert_array_equal(gradient, expected[1], err_msg=name)


def test_every_method_is_measured_and_shown(tmp_path):
    files = ["--json", str(tmp_path / "s.json"), "--picture", str(tmp_path / "s.png")]
    cases = ["--sizes", "1e3", "--densities", "0.1", "--data", "normal", "--threads", "2"]
    output = run("-m", "benchmarks.selection", *cases, "--repeats", "1", *files)
    (row,) = json.loads((tmp_path / "s.json").read_text())["rows"]
    assert row["k"] == 100
    assert len(row["s"]) == 8
    for method, parts in row["s"].items():
        assert method in output
        assert 0 < parts["select"]["median"] <= parts["step"]["median"]
    assert (tmp_path / "s.png").read_bytes().startswith(PNG)
