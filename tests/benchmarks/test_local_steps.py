"""Local steps of the race: rounds of one step are dense training; ranks agree after each round."""

from __future__ import annotations

import threading

import pytest

from tests.jobs import needs

torch = pytest.importorskip("torch")

pytestmark = [needs("torch"), needs("horovod"), needs("sklearn")]
RANKS, RATE = 2, 0.1


def model_of_rank():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Tanh())


def examples(rank, step):
    return torch.randn(5, 3, generator=torch.Generator().manual_seed(10 * step + rank))


def train(steps, every, rate, momentum):
    """The models of all ranks after some steps of SGD; ranks are threads."""
    from benchmarks.race.local_steps import Rounds

    barrier, vectors = threading.Barrier(RANKS), [None] * RANKS
    models = [model_of_rank() for _ in range(RANKS)]

    def work(rank):
        def average(vector):
            vectors[rank] = vector.clone()
            barrier.wait()
            vector.copy_(sum(vectors) / RANKS)
            barrier.wait()

        rounds = Rounds(models[rank], rate, momentum, average)
        sgd = torch.optim.SGD(models[rank].parameters(), RATE)
        for step in range(steps):
            sgd.zero_grad()
            models[rank](examples(rank, step)).square().mean().backward()
            sgd.step()
            if (step + 1) % every == 0:
                rounds.finish()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(RANKS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return models


def test_rounds_of_one_step_that_average_are_dense_sgd():
    dense = model_of_rank()
    sgd = torch.optim.SGD(dense.parameters(), RATE)
    for step in range(4):
        sgd.zero_grad()
        losses = [dense(examples(rank, step)).square().mean() for rank in range(RANKS)]
        (sum(losses) / RANKS).backward()
        sgd.step()
    for own in train(4, every=1, rate=1.0, momentum=0.0):
        for weights, expected in zip(own.parameters(), dense.parameters(), strict=True):
            torch.testing.assert_close(weights, expected)


def test_ranks_agree_after_a_round_on_weights_and_statistics():
    one, other = (each.state_dict() for each in train(4, every=2, rate=0.7, momentum=0.9))
    assert all(torch.equal(one[name], other[name]) for name in one)
    first = train(0, every=2, rate=0.7, momentum=0.9)[0].state_dict()
    assert not torch.equal(one["0.weight"], first["0.weight"])


def test_ranks_differ_within_a_round():
    one, other = train(3, every=2, rate=0.7, momentum=0.9)
    assert not torch.equal(one[0].weight, other[0].weight)


def test_what_trains_a_task_is_what_was_found_for_it():
    from benchmarks.convergence.adam_ways import WAYS
    from benchmarks.convergence.tasks import TASKS
    from benchmarks.race.tuning import tuning
    from benchmarks.rounds.methods import Method

    code, way = TASKS["code"], WAYS["adam-double-0.5"]
    sparse = tuning(code, Method.parse("dls:0.01"), 1000, ranks=4)
    assert sparse.rate == way.rate * code.adam_rate / code.rate
    assert sparse.options["adam"] == way.options["adam"]
    assert sparse.options["warmup_steps"] == round(way.warmup * 1000)
    assert (sparse.betas, sparse.momentum) == (None, 0.0)
    for name in ("dense", "powersgd:4", "local:8"):
        dense = tuning(code, Method.parse(name), 1000, ranks=4)
        assert (dense.rate, dense.betas) == (code.adam_rate / code.rate, (0.9, 0.999))
    images = tuning(TASKS["images"], Method.parse("local:8:1:0"), 1000, ranks=4)
    assert (images.rate, images.betas, images.momentum) == (1.0, None, 0.9)
