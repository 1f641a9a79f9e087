"""Which runs there are, and in which order."""

from __future__ import annotations

from tests.jobs import needs

pytestmark = [needs("torch"), needs("sklearn")]


def test_seed_by_seed_and_what_a_run_needs_before_it():
    from benchmarks.convergence.runs import Run, all_runs, usual_runs
    from benchmarks.convergence.settings import NEAR_NOISE, SETTINGS
    from benchmarks.convergence.tasks import TASKS

    hard = Run("text", "hard-0.01-corrected", 4, 1)
    needed = hard._replace(setting="dls-0.01-corrected")
    assert all_runs(["text"], ["hard*"], [1]) == [needed, hard]
    runs = all_runs(TASKS, ["*"], [0, 1, 2])
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)
    assert {run.setting for run in runs} == set(SETTINGS)
    assert len(runs) == len(set(runs))
    usual = usual_runs(TASKS, ["*"])
    assert usual[: len(runs)] == runs
    assert {run.seed for run in usual[len(runs) :]} == {3, 4}
    assert {(run.task, run.setting) for run in usual[len(runs) :]} == NEAR_NOISE
