"""What the workers of an elastic job say of their steps, put together and checked."""

from __future__ import annotations

import math
from collections import defaultdict

import psutil

from tests.elastic.job import ElasticJob, Event

# On all ranks, to the bit; of Adam's moments what they are divided by, which tells their age.
ALIKE = ("weights", "ratios", "step_of_compressor", "sent", "age_of_moments")
CLOSE = 1e-5  # of sums of a thousand float32, each of them below one


class History:
    """The steps of a job, as its workers report them.

    Args:
        job: whose program says "start"; and "step", with what tests/elastic/torch_program.py tells.
            A world is what lies between two changes of the job's workers.
    """

    def __init__(self, job: ElasticJob) -> None:
        self._job = job

    def wait_for_steps(self, size: int, steps: int = 5) -> None:
        """Waits for so many steps of so many ranks from now on."""
        before = len(self._job.events("step"))

        def there() -> bool:
            events = [e for e in self._job.events("step")[before:] if e["size"] == size]
            return len(events) >= size * steps

        self._job.wait_until(there, f"{steps} steps of {size} ranks")

    def wait_for_worker(self, host: str) -> None:
        """Waits until a worker on a host has reported a step."""

        def there() -> bool:
            return any(event["host"] == host for event in self._job.events("step"))

        self._job.wait_until(there, f"a step of the worker on {host}")

    def wait_for_death(self, host: str) -> None:
        """Waits until the worker on a host has started, and is gone."""

        def gone() -> bool:
            started = any(event["host"] == host for event in self._job.events("start"))
            return started and not psutil.pid_exists(self.pid_on(host))

        self._job.wait_until(gone, f"the death of the worker on {host}")

    def pid_on(self, host: str) -> int:
        """The worker that was started last on a host."""
        return [e["pid"] for e in self._job.events("start") if e["host"] == host][-1]

    def worlds(self) -> list[dict[int, list[Event]]]:
        """All worlds, one after the other: of each step, what the ranks say, in rank order.

        Steps that some rank did not live to report are left out.
        """
        worlds: dict[str, dict[int, list[Event]]] = defaultdict(lambda: defaultdict(list))
        for event in self._job.events("step"):
            worlds[event["world"]][event["step"]].append(event)
        return [
            {
                step: sorted(of_ranks, key=lambda event: event["rank"])
                for step, of_ranks in sorted(worlds[world].items())
                if len(of_ranks) == of_ranks[0]["size"]
            }
            for world in sorted(worlds, key=float)
        ]

    def check(self, density: float | None = None) -> list[int]:
        """Checks all there is to check.

        In each step all ranks have the same weights and ratios; each step is the next one, in one
        world as from one to another; and the compressor counts as the training does.  Nothing gets
        lost that ought not to: what the weights are, less what waits in residuals, moves with the
        gradients alone; also when the number of ranks changes, but for what lost workers owed.
        The loss falls.

        Args:
            density: what is sent in each step of several ranks, if that stays the same.

        Returns:
            Number of ranks in each world.
        """
        told: dict[int, dict[int, Event]] = defaultdict(dict)  # the last of each step, by worker
        for event in self._job.events("loaded"):
            told[event["pid"]][0] = event
        worlds = [world for world in self.worlds() if world]
        # Said where a failure came between the commits of two ranks, which is seldom.
        mixed = "residuals of this rank are of step(s)" in self._job.output()
        for world in worlds:
            for step, events in world.items():
                assert len({e["rank"] for e in events}) == len(events), events
                for key in ALIKE:
                    assert len({e.get(key) for e in events}) == 1, (key, events)
                assert events[0].get("step_of_compressor", step) == step, events
                if density is not None and events[0]["size"] > 1:
                    sent, entries = events[0]["sent"], events[0]["entries"]
                    assert abs(sent - density * entries) <= 0.1 * density * entries, events
                if step > 1 or 0 in told[events[0]["pid"]]:
                    before = [told[e["pid"]].get(step - 1) for e in events]
                    assert before[0] is not None, f"step {step} without {step - 1}: {events}"
                    if not (mixed and step == min(world)):
                        self._check_mass([e for e in before if e is not None], events)
                for event in events:
                    told[event["pid"]][step] = event
        losses = [
            sum(e["loss"] for e in events) / len(events) for w in worlds for events in w.values()
        ]
        first, last = losses[:10], losses[-10:]
        assert sum(last) / len(last) < 0.7 * sum(first) / len(first), losses
        return [next(iter(world.values()))[0]["size"] for world in worlds]

    def _check_mass(self, before: list[Event], after: list[Event]) -> None:
        """From one step to the next; ``before`` is of those who were there."""
        if "sum_of_residual" not in after[0]:
            return
        rate = after[0]["rate"]
        gradient = sum(e["sum_of_gradient"] for e in after) / len(after)
        expected = _mass(before) - rate * gradient
        assert math.isclose(_mass(after), expected, abs_tol=CLOSE), (
            f"{_mass(after)}, expected {expected}: {before} {after}"
        )


def _mass(events: list[Event]) -> float:
    """What the first layer's weights would add up to if residuals were applied now.

    Those of workers that are not among the events are left out: they are lost.
    """
    waiting = sum(e["sum_of_residual"] for e in events) / events[0]["size"]
    return events[0]["sum_of_weights"] - events[0]["rate"] * waiting
