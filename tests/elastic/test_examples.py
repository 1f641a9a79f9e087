"""The elastic examples while a worker comes, and one dies."""

import re

import pytest

from tests.elastic.job import CHANGE, ElasticJob, host, needs_gloo
from tests.jobs import needs

pytestmark = [needs("sklearn"), needs_gloo]


@pytest.mark.parametrize(
    "example",
    [
        pytest.param("torch_elastic.py", marks=needs("torch")),
        pytest.param("keras_elastic.py", marks=needs("tensorflow")),
    ],
)
def test_an_example(example):
    command = [f"examples/{example}", "--epochs", "100000", "--density", "0.05"]
    # Two workers notice a death at once; and one may be long in importing its framework.
    patience = {"HOROVOD_GLOO_TIMEOUT_SECONDS": str(CHANGE)}
    with ElasticJob(command, {host(0): 1}, patience) as job:

        def losses(workers):
            epochs = rf"epoch \d+, {workers} workers, loss ([\d.]+)"
            return list(map(float, re.findall(epochs, job.output())))

        [first, *_] = job.wait_until(lambda: losses(1), "an epoch of one")
        job.add(host(1))
        job.wait_until(lambda: losses(2), "an epoch of two")
        alone = len(losses(1))
        job.kill(job.workers(host(1))[-1])
        learnt = "half the first loss, on the survivor alone"
        job.wait_until(lambda: min(losses(1)[alone:], default=first) < first / 2, learnt)
