"""Real elastic jobs with TensorFlow and Keras 3: workers come, die in mid-step and leave."""

import json

import pytest

from tests.elastic.job import ElasticJob, host, needs_gloo
from tests.jobs import JOB, needs

pytestmark = [needs("tensorflow"), needs_gloo]

SPARSE = {"density": 0.05, "cost_rule": False, "dense_below": 0}
PROGRAM = "tests/elastic/tensorflow_program.py"
# Survivors wait so long for a newcomer, which imports TensorFlow meanwhile; and ranks that are not
# beside a dead one learn of it when this is up.
ENV = {"HOROVOD_GLOO_TIMEOUT_SECONDS": "60"}


class Watched:
    """A job whose steps are looked at: all ranks of each must be alike.

    Args:
        job: that runs ``PROGRAM``.
    """

    def __init__(self, job: ElasticJob) -> None:
        self.job = job

    def go_on_with(self, size, words, steps=3):
        """Waits for some more steps of this many ranks, one of whom then is returned."""
        known = len(self.job.events("step"))

        def last():
            new = [event for event in self.job.events("step")[known:] if event["size"] == size]
            return new[-1] if len(new) >= steps * size else None

        return self.job.wait_until(last, words)

    def pid_of(self, name):
        return next(e["pid"] for e in self.job.events("start") if e["host"] == name)

    def finish(self, pid):
        self.job.order(pid, "finish")
        self.job.wait(JOB)

    def check(self, keys=("weights", "ratios", "compressed")):
        """All ranks that made a step together have the same weights, ratios and number of steps."""
        together = {}
        for event in self.job.events("step"):
            together.setdefault((event["size"], event["step"]), []).append(event)
        for (size, step), events in together.items():
            # A step may be made again after a restore, with the same result or another.
            attempts = {}
            for event in events:
                attempts.setdefault(event["rank"], []).append([event[key] for key in keys])
            last = {json.dumps(of_rank[-1]) for of_rank in attempts.values()}
            assert len(attempts) < size or len(last) == 1, (size, step, events)


@pytest.mark.parametrize("how", ["function", "fit"])
def test_workers_come_die_and_leave(how):
    command = [PROGRAM, how, json.dumps(SPARSE)]
    with ElasticJob(command, {host(0): 1, host(1): 1}, ENV) as job:
        watched = Watched(job)
        watched.go_on_with(2, "steps of two")
        job.add(host(2))
        watched.go_on_with(3, "steps of three, one of them new")
        job.order(watched.pid_of(host(1)), "die in backward")
        watched.go_on_with(2, "steps of the two survivors")
        job.add(host(3))
        watched.go_on_with(3, "steps of three again")
        job.remove(host(2))
        watched.go_on_with(2, "steps of two after one has left")
        job.order(watched.pid_of(host(3)), "die in backward")
        last = watched.go_on_with(1, "steps of one alone")
        watched.finish(last["pid"])
        watched.check()
        losses = [event["loss"] for event in job.events("step")]
        assert sum(losses[-10:]) < sum(losses[:10])
        assert [event["pid"] for event in job.events("end")] == [last["pid"]]
