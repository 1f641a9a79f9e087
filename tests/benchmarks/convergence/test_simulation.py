"""Simulated workers do what ranks of a real job do."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from hvd_dls.config import DLSConfig
from tests.jobs import horovodrun, needs

pytestmark = [needs("torch"), needs("sklearn")]

STEPS = 10
EVERYTHING = {"density": 1.0, "cost_rule": False, "dense_below": 0}
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


def test_hosts_are_as_many_workers_with_their_averages_to_rounding():
    """Two hosts of two train as two workers do whose batches are those of a host."""
    import torch

    from benchmarks.convergence.simulation import SimulatedJob, exchange_all

    rng, trained_by = np.random.default_rng(0), []
    own = [rng.normal(size=(60, 50)).astype(np.float32) for _ in range(8)]
    for hosts in ((2, 2), None):
        model = torch.nn.Linear(50, 60, bias=False)
        options = {"density": 0.05, "momentum": 0.5, "hierarchical": bool(hosts)}
        config = DLSConfig.from_options(**options, dense_below=0, cost_rule=False)
        job = SimulatedJob(model, 4 if hosts else 2, config, hosts=hosts)
        sums = np.zeros(3000)
        for a, b in zip(own[::2], own[1::2], strict=True):
            each = [a, b, b, 3 * a] if hosts else [(a + b) / 2, (b + 3 * a) / 2]
            gradients = [{"weight": gradient.ravel().copy()} for gradient in each]
            first, *others = exchange_all(job.sessions, gradients)
            assert all(np.array_equal(first["weight"], other["weight"]) for other in others)
            sums += first["weight"]
        trained_by.append(sums)
    np.testing.assert_allclose(*trained_by, rtol=1e-5, atol=1e-6)


def test_ways_to_train_on_hosts(tmp_path, capsys):
    from benchmarks.convergence import hosts

    arguments = ["--tasks", "digits", "--seeds", "0", "--steps", "3", "--folder", str(tmp_path)]
    ways = ["--ways", "dense", "hosts", "flat-equal"]
    for chosen in (ways, ways, ["--report"]):  # the second time from what was kept
        assert hosts.main([*arguments, *chosen]) == 0
        printed = capsys.readouterr().out
        assert "| two levels | 16 | 3 |" in printed
        assert "| flat | 16 | 15 | - |" in printed


def test_density_one_is_dense_to_rounding():
    models = [trained("digits", 4, options, steps=2)[0] for options in (None, EVERYTHING)]
    for dense, sparse in zip(*(model.parameters() for model in models), strict=True):
        np.testing.assert_allclose(
            sparse.detach().numpy(), dense.detach().numpy(), rtol=1e-3, atol=1e-5
        )


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
