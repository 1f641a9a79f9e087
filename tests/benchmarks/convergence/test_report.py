"""The page, from results of few steps."""

from __future__ import annotations

import re

import numpy as np
import pytest

from tests.benchmarks.running import PNG
from tests.jobs import needs

pytestmark = [needs("torch"), needs("sklearn")]


@needs("matplotlib")
@pytest.mark.parametrize("fitted", [True, False], ids=["with a cost model", "without"])
def test_the_page(kept, tmp_path, monkeypatch, fitted):
    from benchmarks.convergence import report, times
    from benchmarks.cost_model.fit import TERMS

    of = {"copy": 1e-9, "pass": 1e-9, "entry": 1e-9, "wire": 1.0}
    terms = np.array([of.get(term, 0.0) for term in TERMS])
    monkeypatch.setattr(times, "fitted_terms", lambda: terms if fitted else None)
    folder, runs = kept
    page = tmp_path / "docs" / "convergence.md"
    report.build(folder, page, steps=4)
    text = page.read_text()
    assert f"{len(runs)} runs" in text
    for row in ("dense", "DLS", "constant threshold", "layer-wise top-k"):
        assert re.search(rf"^\| {row}[^|]* \| [\d.]+ ± [\d.]+ \|", text, re.M), row
    assert re.search(r"^\| text \| dense \| 4 \| [\d.]+ \|", text, re.M)  # longer
    assert re.search(r"^\| code \| DLS, 1.0% \| [\d.]+ \| [-+][\d.]+\? \|", text, re.M)  # Adam
    kept_row = r"^\| momentum of sent entries kept \| [\d.]+ ± [\d.]+ \|"
    assert re.search(kept_row, text, re.M)
    assert re.search(r"^\| prior uniform \| [\d.]+ \| [-+][\d.]+\? \|", text, re.M)  # one seed
    assert ("Left out: `benchmarks/results.py`" not in text) == fitted
    assert (re.search(r"^\| digits: density \|.* 1gbit, s \|", text, re.M) is not None) == fitted
    assert "nan" not in text
    pictures = re.findall(r"\]\((images/convergence-\w+\.png)\)", text)
    assert len(pictures) == 4
    assert all((page.parent / picture).read_bytes().startswith(PNG) for picture in pictures)
    with pytest.raises(SystemExit, match="no results"):
        report.build(folder, page, steps=5)


def test_noise_and_targets():
    from benchmarks.convergence.tables import within_noise
    from benchmarks.convergence.times import steps_to

    assert within_noise(np.array([1.0, 2.0, 3.0]), np.array([2.0, 3.0, 4.0]))
    assert not within_noise(np.array([1.0, 1.1, 1.2]), np.array([2.0, 2.1, 2.2]))
    losses = [9.0, None, 9.0, 1.0, 5.0, 3.0, 3.0, 3.0]  # a blip at 20
    result = {"curve": {"step": [5 * (1 + i) for i in range(8)], "loss": losses}}
    assert [steps_to(result, target) for target in (9.0, 4.0, 2.0)] == [5, 25, np.inf]
