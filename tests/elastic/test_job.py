"""The harness itself, with plain Horovod: a host comes, a worker dies, hosts go."""

import pytest

from tests.elastic.job import ElasticJob, host, needs_gloo
from tests.jobs import JOB, needs

pytestmark = [needs("torch"), needs_gloo]


def test_workers_come_die_and_leave():
    with ElasticJob(["tests/elastic/torch_program.py", '"dense"'], {host(0): 1, host(1): 1}) as job:

        def steps(size):
            return [event for event in job.events("step") if event["size"] == size]

        job.wait_until(lambda: steps(2), "a step of two")
        job.add(host(2))
        job.wait_until(lambda: steps(3), "a step of three")
        of_two = len(steps(2))
        victim = next(e["pid"] for e in job.events("start") if e["host"] == host(1))
        job.order(victim, "die in backward")
        job.wait_until(lambda: steps(2)[of_two:], "a step of the survivors")
        job.remove(host(1), host(2))
        last = job.wait_until(lambda: steps(1), "a step of one alone")[0]
        job.order(last["pid"], "finish")
        job.wait(JOB)
        assert [event["pid"] for event in job.events("end")] == [last["pid"]]


def test_what_hangs_fails_the_test_and_shows_the_output():
    code = "import time; print('waiting', flush=True); time.sleep(9999)"
    with ElasticJob(["-c", code], {host(0): 1}) as job:
        job.wait_until(lambda: "waiting" in job.output(), "a line")
        with pytest.raises(pytest.fail.Exception, match=r"(?s)what never comes.*waiting"):
            job.wait_until(lambda: False, "what never comes", time_limit=1)
        assert not job.runs()
