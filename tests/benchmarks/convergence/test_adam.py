"""Ways to train with Adam: what they compute where it is known what should come out."""

from __future__ import annotations

import dataclasses
import pickle

import numpy as np
import pytest

from tests.jobs import needs

pytestmark = [needs("torch"), needs("sklearn")]

STEPS, SIZE = 300, 50


def gradients_of(workers):
    """(STEPS, workers, SIZE) of a drift and noise."""
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(STEPS, workers, SIZE)) * np.exp(rng.normal(size=SIZE))
    return (rng.normal(size=SIZE) + noise).astype(np.float32)


def updates_of(second, gradients):
    """(STEPS, SIZE), the mean over workers."""
    from benchmarks.convergence.preconditioning import Moments, Preconditioner

    preconditioner = Preconditioner(Moments(second), gradients.shape[1])
    steps = [preconditioner.updates([{"a": own} for own in of_all]) for of_all in gradients]
    return np.array([np.mean([own["a"] for own in step], axis=0) for step in steps])


def dense_updates(gradients):
    """(STEPS, SIZE) of torch's Adam with the averages."""
    import torch

    weight = torch.nn.Parameter(torch.zeros(SIZE, dtype=torch.float64))
    adam = torch.optim.Adam([weight], lr=1.0)
    updates = []
    for mean in gradients.astype(np.float64).mean(axis=1):
        before = weight.detach().clone()
        weight.grad = torch.from_numpy(mean)
        adam.step()
        updates.append((before - weight.detach()).numpy())
    return np.array(updates)


@pytest.mark.parametrize(("second", "workers"), [("oracle", 4), ("own", 1), ("scaled", 1)])
def test_with_the_averaged_gradients_second_moment_the_mean_is_dense_adams_update(second, workers):
    gradients = gradients_of(workers)
    assert updates_of(second, gradients) == pytest.approx(dense_updates(gradients), abs=1e-5)


def test_a_scaled_second_moment_is_nearer_to_the_averaged_gradients_than_the_own():
    gradients = gradients_of(16)
    dense = dense_updates(gradients)[-1]
    errors = [np.abs(updates_of(s, gradients)[-1] - dense).mean() for s in ("own", "scaled")]
    assert errors[1] < errors[0] / 2


def test_runs_are_kept_and_a_table_made_of_them(tmp_path, monkeypatch, capsys):
    from benchmarks.convergence import adam

    monkeypatch.setattr(adam, "TASK", "digits")
    arguments = ["--steps", "2", "--folder", str(tmp_path), "--ways", "dense", "scaled", "behind"]
    assert adam.main(arguments) == 0
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 5
    assert all(line.count("|") == 5 for line in table)
    files = {file.name: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    assert set(files) == {"dense-2-0.json", "scaled-2-0.json", "behind-2-0.json"}
    assert adam.main(arguments) == 0
    assert files == {file.name: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    others = ["--steps", "2", "--folder", str(tmp_path), "--ways", "dense", "behind"]
    assert adam.main([*others, "--density", "0.001", "--rate", "2"]) == 0
    new = {file.name for file in tmp_path.iterdir()} - set(files)
    # Dense has no density.
    assert new == {"dense-2-0-rate-2.json", "behind-2-0-density-0.001-rate-2.json"}


def test_a_run_that_is_interrupted_goes_on_as_if_it_had_not_been(monkeypatch):
    from benchmarks.convergence import adam

    monkeypatch.setattr(adam, "TASK", "digits")
    trained = dataclasses.replace(adam.TASKS["digits"], adam_rate=0.01)  # it has none of its own
    monkeypatch.setitem(adam.TASKS, "digits", trained)
    whole, interrupted = (adam.Training(adam.Run("scaled", 3, 0)) for _ in range(2))
    interrupted.step()
    interrupted = pickle.loads(pickle.dumps(interrupted))
    for training in (whole, interrupted):
        while not training.done:
            training.step()
    assert whole.losses == interrupted.losses
