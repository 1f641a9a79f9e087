"""Results of a few short runs, which several tests look at."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def one_thread():
    """Sets the number of threads that ranks of a job have here; sums depend on it."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def kept(tmp_path_factory):
    """A folder with the results of a few runs of four steps, and these runs."""
    from benchmarks.convergence.runs import all_runs
    from benchmarks.convergence.settings import WORKERS
    from benchmarks.convergence.sweep import sweep

    folder = tmp_path_factory.mktemp("convergence")
    settings = ["dense", "dls-0.01", "dls-0.01-corrected", "hard-0.01-corrected"]
    settings += ["layerwise-0.01-corrected", "dls-0.01-uniform", "dls-0.01-corrected-kept"]
    runs = [
        run
        for run in all_runs(["digits"], settings, [0, 1])
        if run.workers == WORKERS and not (run.seed and "uniform" in run.setting)
    ]
    runs += all_runs(["text"], ["d*-long"], [0]) + all_runs(["code"], ["d*-adam"], [0])
    assert sweep(runs, 4, folder, jobs=1) == []
    return folder, runs
