"""Tasks: data, models, batches and learning rates."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from tests.jobs import needs

pytestmark = [needs("torch"), needs("sklearn")]


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


def test_more_workers_share_the_same_batch():
    import torch

    from benchmarks.convergence.data import Examples
    from benchmarks.convergence.tasks import TASKS, batch

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
