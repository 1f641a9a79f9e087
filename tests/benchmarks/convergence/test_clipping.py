"""Where gradients are clipped: that it happens there, and that results are kept."""

from __future__ import annotations

import pytest

from tests.jobs import needs

pytestmark = [needs("torch"), needs("sklearn")]


def test_trainings_are_kept_and_a_table_made_of_them(tmp_path, monkeypatch, capsys):
    from benchmarks.convergence import adam, clipping

    monkeypatch.setattr(adam, "TASK", "digits")
    arguments = ["--steps", "2", "--folder", str(tmp_path), "--ways", "dense-sum", "own", "option"]
    assert clipping.main(arguments) == 0
    assert len(capsys.readouterr().out.splitlines()) == 5
    files = {file.name: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    assert len(files) == 3
    assert clipping.main(arguments) == 0
    assert files == {file.name: file.stat().st_mtime_ns for file in tmp_path.iterdir()}


@pytest.mark.parametrize("name", ["own", "last", "sum", "option", "no"])
def test_each_way_clips_where_it_says(name):
    import torch

    from benchmarks.convergence.adam import Run
    from benchmarks.convergence.clipping import EVERY, WAYS, ClippedJob, Clipping, global_norm

    model, limit = torch.nn.Linear(60, 40), 1.0
    way = WAYS[name]
    run = Run(way.way, 10, 0)
    job = ClippedJob(Clipping(name, limit, 100.0, run), model, 2, run.config())
    rng = torch.Generator().manual_seed(0)
    for step in range(1, EVERY + 1):
        inputs = torch.randn(8, 60, generator=rng)
        gradients, _ = job.gradients(lambda worker, x=inputs: model(x).sum() / 20)
        norms = [global_norm(own) for own in gradients]
        assert name != "own" or max(norms) < limit + 1e-5
        assert name != "last" or step < EVERY or max(norms) > 50 * limit  # one step too late
        reduced = job.reduced(gradients)
        assert global_norm(reduced) < limit + 1e-5 or name != "sum"
    if name == "option":
        shares = job.sessions[1].memory.correction.shares
        assert sum(shares.squares.values()) == pytest.approx(1)
