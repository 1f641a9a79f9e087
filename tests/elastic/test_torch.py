"""Elastic jobs with torch: workers come, leave and die, and all ranks go on alike."""

import json
import os
import random
import time
from typing import Any

import pytest

from tests.elastic.history import History
from tests.elastic.job import ElasticJob, host, needs_gloo
from tests.jobs import JOB, needs

pytestmark = [needs("torch"), needs_gloo]

PROGRAM = "tests/elastic/torch_program.py"
SMALL = {"density": 0.05, "dense_below": 0, "bucket_bytes": 2048}  # for a model of four buckets


def test_workers_load_come_die_and_leave():
    """The state is not given the compressor, as in a script of Horovod's own examples.

    One of two that have loaded a state dies before the first commit, so what the other has loaded
    is of more ranks than there are.  What newcomers load is dropped, since that one has trained.
    """
    with job_of(2, SMALL, "loads") as job:
        history = History(job)
        job.order(host(1), "die in step 2")
        history.wait_for_steps(1)
        job.add(host(2))
        job.add(host(3))
        history.wait_for_steps(3)
        job.order(history.pid_on(host(2)), "die in backward")
        history.wait_for_steps(2)
        job.remove(host(3))
        history.wait_for_steps(1)
        finish(job, history, host(0))
        assert history.check(density=0.05) == [2, 1, 3, 2, 1]
        assert "the state that was loaded on this rank is dropped" in job.output()


def test_one_worker_becomes_many_and_two_die_at_once():
    """The state is given the compressor, which has Adam and a warm-up."""
    with job_of(1, SMALL | {"adam": [0.5, 0.999], "warmup_steps": 40}, "given") as job:
        history = History(job)
        history.wait_for_steps(1)
        job.add(host(1), slots=2)
        job.add(host(2))
        history.wait_for_steps(4)
        for number in (1, 2):
            job.order(history.pid_on(host(number)), "die when backward begins")
        history.wait_for_steps(1)  # Horovod gives up a host of which a worker dies
        job.add(host(3))
        history.wait_for_steps(2, steps=40)
        job.remove(host(3))
        history.wait_for_steps(1)
        finish(job, history, host(0))
        assert history.check() == [1, 4, 1, 2, 1]


# To see ten of them, for three minutes: HVD_DLS_TEST_DEATHS=10 pytest tests/elastic
DEATHS = int(os.environ.get("HVD_DLS_TEST_DEATHS", "4"))


def test_workers_die_one_after_the_other_and_others_come():
    """In steps, between them, and while ranks agree; not in ``hvd.init()``, which Gloo aborts."""
    generator = random.Random(0)
    kinds = ["any time", "of three", "in backward", "at its first gradient"]
    deaths = [kinds[number % len(kinds)] for number in range(DEATHS)]
    with job_of(2, SMALL) as job:
        history, alive = History(job), [0, 1]
        history.wait_for_steps(2)
        for new, how in enumerate(deaths, start=2):
            if how == "at its first gradient":  # the others wait for it there
                job.order(host(new), "die when backward begins")
                job.add(host(new))
                history.wait_for_death(host(new))
            else:
                victim = alive.pop(generator.randrange(2))
                if how == "of three":
                    job.add(host(new))
                    history.wait_for_steps(3)
                if how == "in backward":
                    job.order(history.pid_on(host(victim)), "die in backward")
                else:
                    time.sleep(generator.random() / 10)
                    job.kill(history.pid_on(host(victim)))
                job.add(host(new))
                alive.append(new)
                history.wait_for_worker(host(new))
            history.wait_for_steps(2)
        finish(job, history, host(alive[0]))
        assert len(history.check(density=0.05)) > DEATHS


def test_two_levels_are_refused_in_words():
    words = "hierarchical=True in an elastic job"
    with (
        job_of(2, SMALL | {"hierarchical": True}) as job,
        pytest.raises(pytest.fail.Exception, match=words),
    ):
        job.wait(JOB)


def job_of(workers: int, options: dict[str, Any], *arguments: str) -> ElasticJob:
    hosts = {host(number): 1 for number in range(workers)}
    return ElasticJob([PROGRAM, json.dumps(options), *arguments], hosts)


def finish(job: ElasticJob, history: History, name: str) -> None:
    job.order(history.pid_on(name), "finish")
    job.wait(JOB)


def test_workers_with_local_steps_come_and_die():
    """Of each world some rounds, after which all of its ranks hold the same weights."""
    with ElasticJob(["tests/elastic/local_steps_program.py"], {host(0): 1, host(1): 1}) as job:
        history = History(job)

        def wait_for_rounds(size, count):
            begun = len(job.events("step"))
            job.wait_until(
                lambda: sum(e["size"] == size for e in job.events("step")[begun:]) >= count,
                f"{count} rounds of {size}",
                120,
            )

        wait_for_rounds(2, 4)
        job.add(host(2))
        wait_for_rounds(3, 6)
        job.order(history.pid_on(host(1)), "die in backward")
        wait_for_rounds(2, 4)
        job.order(history.pid_on(host(0)), "finish")
        job.wait(60)
        weights: dict[tuple[str, int], set[int]] = {}
        for event in job.events("step"):
            weights.setdefault((event["world"], event["step"]), set()).add(event["weights"])
        assert all(len(each) == 1 for each in weights.values()), weights
        assert len({world for world, _ in weights}) == 3
