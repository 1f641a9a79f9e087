"""Runs that are made, kept, and made again."""

from __future__ import annotations

import json

import numpy as np

from tests.jobs import needs

pytestmark = [needs("torch"), needs("sklearn")]


def times(folder):
    return {file.name: file.stat().st_mtime_ns for file in folder.glob("*/*")}


def test_only_what_is_missing_or_has_changed_is_made(kept):
    from benchmarks.convergence.sweep import sweep

    folder, runs = kept
    before = times(folder)
    assert len(before) == len(runs)  # and no unfinished ones
    assert sweep(runs, 4, folder, jobs=1) == []
    assert times(folder) == before
    lost, stale = runs[0], runs[1]
    expected = json.loads(lost.file(folder).read_text())
    lost.file(folder).unlink()
    result = json.loads(stale.file(folder).read_text())
    result["about"]["rate"] *= 2
    stale.file(folder).write_text(json.dumps(result))
    assert sweep(runs, 4, folder, jobs=1) == []
    after = times(folder)
    changed = {name for name in before if after[name] != before[name]}
    assert changed == {lost.file(folder).name, stale.file(folder).name}
    made = json.loads(lost.file(folder).read_text())
    for part in ("about", "loss", "curve", "parameters_sha256"):
        assert made[part] == expected[part]


def test_a_result_has_all_that_the_page_needs(kept):
    from benchmarks.convergence.runs import Run

    folder, _ = kept
    result = json.loads(Run("digits", "dls-0.01", 4, 0).file(folder).read_text())
    for part in ("curve", "quality", "layers"):
        assert result[part]["step"] == [1, 2, 3, 4]
    assert set(result["shared"]) == {"step", "misallocation", "least"}
    layers = len(result["layers"]["names"])
    assert (
        np.shape(result["layers"]["k"]) == np.shape(result["layers"]["thresholds"]) == (4, layers)
    )
    assert result["entries_sent"] == np.sum(result["layers"]["k"], axis=1).mean()
    assert 0 < result["sparse_bytes"] < result["entries"]
    dense = json.loads(Run("digits", "dense", 4, 0).file(folder).read_text())
    assert dense["dense_bytes"] == 4 * dense["entries"]


def test_a_run_that_diverges_is_kept_as_such(tmp_path, monkeypatch):
    from benchmarks.convergence.results import Groups
    from benchmarks.convergence.runs import Run, description, read
    from benchmarks.convergence.settings import SETTINGS
    from benchmarks.convergence.sweep import run_and_keep
    from benchmarks.convergence.tables import metric

    monkeypatch.setitem(SETTINGS, "dense", SETTINGS["dense"]._replace(rate=1e30))
    run = Run("digits", "dense", 2, 0)
    run_and_keep(description(run, 4, tmp_path), run.file(tmp_path))
    result = read(run, 4, tmp_path)
    assert result is not None
    assert result["diverged"] > 0
    assert result["loss"] is None
    group = Groups([result]).get("digits", "dense", 2)
    assert metric(group) == "1 of 1 diverged"
