"""Real elastic jobs with TensorFlow: workers come, leave and die in mid-step; all go on alike.

They die where there are two: the other notices at once (see docs/elastic.md), and may have as much
patience with newcomers, which import TensorFlow while it waits.
"""

import json

from tests.elastic.history import History
from tests.elastic.job import CHANGE, ElasticJob, host, needs_gloo
from tests.jobs import JOB, needs

pytestmark = [needs("tensorflow"), needs_gloo]

SPARSE = {"density": 0.05, "cost_rule": False, "dense_below": 0, "bucket_bytes": 2048}


def job_of(workers, how, env=None):
    command = ["tests/elastic/tensorflow_program.py", how, json.dumps(SPARSE)]
    env = {"HOROVOD_GLOO_TIMEOUT_SECONDS": str(CHANGE)} | (env or {})
    return ElasticJob(command, {host(number): 1 for number in range(workers)}, env)


def finish(job, history, name):
    job.order(history.pid_on(name), "finish")
    job.wait(JOB)


def test_a_tape_in_a_traced_function():
    """A worker alone leaves the compressor out; what waits then is not lost."""
    with job_of(2, "function") as job:
        history = History(job)
        history.wait_for_steps(2)
        job.add(host(2))
        history.wait_for_steps(3)
        job.remove(host(1))
        history.wait_for_steps(2)
        job.order(history.pid_on(host(2)), "die in backward")
        history.wait_for_steps(1)
        job.add(host(3))
        history.wait_for_steps(2, steps=10)
        finish(job, history, host(0))
        assert history.check(density=0.05) == [2, 3, 2, 1, 2]


def test_fit_of_keras_3():
    """A worker alone goes on compressing, with nobody to send to."""
    with job_of(1, "fit") as job:
        history = History(job)
        history.wait_for_steps(1)
        job.add(host(1))
        job.add(host(2))
        history.wait_for_steps(3)
        job.remove(host(1))
        history.wait_for_steps(2)
        job.order(history.pid_on(host(2)), "die in backward")
        history.wait_for_steps(1, steps=10)
        finish(job, history, host(0))
        assert history.check() == [1, 3, 2, 1]


@needs("tf_keras")
def test_fit_of_tf_keras():
    """With Horovod's own optimizer and callbacks."""
    with job_of(1, "fit", {"TF_USE_LEGACY_KERAS": "1"}) as job:
        history = History(job)
        history.wait_for_steps(1)
        job.add(host(1))
        history.wait_for_steps(2)
        job.order(history.pid_on(host(1)), "die in backward")
        history.wait_for_steps(1, steps=10)
        finish(job, history, host(0))
        assert history.check(density=0.05) == [1, 2, 1]
