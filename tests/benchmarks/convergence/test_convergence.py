"""The benchmark of convergence, with few steps: that it simulates a job and keeps what it should.

How well anything trains, is nobody's business here.
"""

from __future__ import annotations

import json
import re
from collections import Counter

import numpy as np
import pytest

from hvd_dls.config import DLSConfig
from tests.jobs import horovodrun, needs

pytestmark = [needs("torch"), needs("sklearn")]

STEPS = 10
PNG = b"\x89PNG"
EVERYTHING = {"density": 1.0, "cost_rule": False, "dense_below": 0}


@pytest.fixture(autouse=True)
def one_thread():
    """As ranks of a job have it here; sums depend on it."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def trained(name, workers, options, steps=STEPS, momentum=0.9):
    """The model, and the job, after some steps of simulated training."""
    import torch

    from benchmarks.convergence.simulation import SimulatedJob
    from benchmarks.convergence.tasks import TASKS, batch, loss, rate_at

    task = TASKS[name]
    data, model = task.data().training, task.make_model(0)
    config = None if options is None else DLSConfig.from_options(**options)
    job = SimulatedJob(model, workers, config)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=momentum)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate_at(task, step, steps)

        def worker_loss(worker, step=step):
            return loss(task, model, batch(task, data, 0, step, worker, workers))

        job.backward(worker_loss)
        optimizer.step()
    return model, job


# The simulation -----------------------------------------------------------------------------------

CASES = [  # task, options of the compressor, the optimizer's momentum
    ("digits", None, 0.9),
    ("digits", {"density": 0.01}, 0.9),
    ("digits", {"strategy": "global", "density": 0.01}, 0.9),
    ("text", {"density": 0.01, "momentum": 0.9, "warmup_steps": 4, "prior": "measured"}, 0.0),
]
REAL_JOB = """
import json, sys
import horovod.torch as hvd
import torch
from benchmarks.convergence.training import sha256
from benchmarks.convergence.tasks import TASKS, batch, loss, rate_at
from hvd_dls.torch import DLSCompressor

hvd.init()
cases, steps = json.loads(sys.argv[1])
for number, (name, options, momentum) in enumerate(cases):
    task = TASKS[name]
    data, model = task.data().training, task.make_model(0)
    compression = hvd.Compression.none
    if options is not None:
        compression = DLSCompressor(model.named_parameters(), **options)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=1.0, momentum=momentum),
        named_parameters=model.named_parameters(), compression=compression,
    )
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate_at(task, step, steps)
        optimizer.zero_grad()
        loss(task, model, batch(task, data, 0, step, hvd.rank(), hvd.size())).backward()
        optimizer.step()
    if hvd.rank() == 0:
        print("case", number, "has", sha256(model), flush=True)
"""


@needs("horovod")
def test_two_simulated_workers_are_two_ranks_of_a_real_job_to_the_bit():
    """Weights, and batch norm's statistics, which are rank 0's own."""
    from benchmarks.convergence.training import sha256

    output = horovodrun(2, ["-c", REAL_JOB, json.dumps([CASES, STEPS])])
    real = dict(re.findall(r"case (\d+) has (\w+)", output))
    assert len(real) == len(CASES), output
    for number, (task, options, momentum) in enumerate(CASES):
        model, _ = trained(task, 2, options, momentum=momentum)
        assert sha256(model) == real[str(number)], CASES[number]


@pytest.mark.parametrize("strategy", ["dls", "layerwise", "global", "norm", "hard"])
def test_all_workers_get_the_same(strategy):
    from benchmarks.convergence.simulation import exchange_all

    options = {"strategy": strategy, "density": 0.02}
    options |= {"threshold": 2.0} if strategy == "hard" else {}
    model, job = trained("digits", 3, options, steps=0)
    rng = np.random.default_rng(0)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    for _ in range(4):
        gradients = [
            {name: rng.normal(size=n).astype(np.float32) for name, n in sizes.items()}
            for _ in range(job.workers)
        ]
        first, *others = exchange_all(job.sessions, gradients)
        assert first.keys() == sizes.keys()
        for other in others:
            assert all(np.array_equal(first[name], other[name]) for name in sizes)
    assert 0 < np.count_nonzero(first["14.weight"]) < 0.5 * sizes["14.weight"]


def test_density_one_is_dense_to_rounding():
    models = [trained("digits", 4, options, steps=2)[0] for options in (None, EVERYTHING)]
    for dense, sparse in zip(*(model.parameters() for model in models), strict=True):
        np.testing.assert_allclose(
            sparse.detach().numpy(), dense.detach().numpy(), rtol=1e-3, atol=1e-5
        )


def test_more_workers_share_the_same_batch():
    import torch

    from benchmarks.convergence.tasks import TASKS, Examples, batch

    task = TASKS["digits"]
    numbers = torch.arange(1000)
    data, steps = Examples(numbers, numbers), 1000 // task.batch

    def drawn(workers, step, seed=0):
        parts = [batch(task, data, seed, step, worker, workers) for worker in range(workers)]
        return torch.cat([part.targets for part in parts]).tolist()

    assert drawn(4, 3) == drawn(16, 3) != drawn(4, 3, seed=1)
    epoch = Counter(number for step in range(steps) for number in drawn(8, step))
    assert len(epoch) == steps * task.batch
    assert drawn(8, 0) != drawn(8, steps)


def test_batch_norm_keeps_worker_zeros_statistics():
    alone = trained("digits", 4, None, steps=1)[0].state_dict()

    import torch

    from benchmarks.convergence.tasks import TASKS, batch, loss

    task = TASKS["digits"]
    model = task.make_model(0)
    with torch.no_grad():
        loss(task, model, batch(task, task.data().training, 0, 0, 0, 4))
    for name, values in model.named_buffers():
        assert torch.equal(values, alone[name]), name


# Tasks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["digits", "images", "text", "code"])
def test_tasks_fit_together(name):
    import torch

    from benchmarks.convergence.tasks import TASKS, evaluate, loss

    task = TASKS[name]
    data, model = task.data(), task.make_model(0)
    few = data.validation.part(slice(0, 40))
    nats, right = evaluate(model, few, at_once=16)
    classes = model(few.inputs).shape[-1]
    assert nats == pytest.approx(np.log(classes), rel=0.1)  # it knows nothing yet
    assert 0 <= right < 0.5
    assert torch.equal(task.data().training.inputs[:9], data.training.inputs[:9])
    loss(task, model, few).backward()
    assert task.output == [name for name, p in model.named_parameters() if p.dim() > 1][-1]
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    assert 100_000 < sum(p.numel() for p in model.parameters()) < 500_000


def test_learning_rate_rises_and_falls():
    from benchmarks.convergence.tasks import TASKS, rate_at

    task = TASKS["digits"]
    rates = [rate_at(task, step, 100) for step in range(100)]
    assert int(np.argmax(rates)) in (9, 10)
    assert max(rates) == task.rate
    assert 0 < rates[0] < 0.2 * task.rate
    assert 0 < rates[-1] < 0.01 * task.rate


# The sweep and its page ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A folder with the results of a few runs of four steps, and these runs."""
    from benchmarks.convergence.settings import WORKERS, all_runs
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


def times(folder):
    return {file.name: file.stat().st_mtime_ns for file in folder.glob("*/*")}


def test_seed_by_seed_and_what_a_run_needs_before_it():
    from benchmarks.convergence.settings import NEAR_NOISE, SETTINGS, Run, all_runs, usual_runs
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
    from benchmarks.convergence.settings import Run

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
    from benchmarks.convergence.report import metric
    from benchmarks.convergence.results import Groups
    from benchmarks.convergence.settings import SETTINGS, Run, description, read
    from benchmarks.convergence.sweep import run_and_keep

    monkeypatch.setitem(SETTINGS, "dense", SETTINGS["dense"]._replace(rate=1e30))
    run = Run("digits", "dense", 2, 0)
    run_and_keep(description(run, 4, tmp_path), run.file(tmp_path))
    result = read(run, 4, tmp_path)
    assert result is not None
    assert result["diverged"] > 0
    assert result["loss"] is None
    group = Groups([result]).get("digits", "dense", 2)
    assert metric(group) == "1 of 1 diverged"


@needs("matplotlib")
@pytest.mark.parametrize("fitted", [True, False], ids=["with a cost model", "without"])
def test_the_page(kept, tmp_path, monkeypatch, fitted):
    from benchmarks.convergence import report, times

    terms = np.array([0, 0, 1e-9, 0, 1e-9, 1e-9, 1.0])
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
    from benchmarks.convergence.report import within_noise
    from benchmarks.convergence.times import steps_to

    assert within_noise(np.array([1.0, 2.0, 3.0]), np.array([2.0, 3.0, 4.0]))
    assert not within_noise(np.array([1.0, 1.1, 1.2]), np.array([2.0, 2.1, 2.2]))
    losses = [9.0, None, 9.0, 1.0, 5.0, 3.0, 3.0, 3.0]  # a blip at 20
    result = {"curve": {"step": [5 * (1 + i) for i in range(8)], "loss": losses}}
    assert [steps_to(result, target) for target in (9.0, 4.0, 2.0)] == [5, 25, np.inf]
