"""The picture of a timeline, from lines as Horovod writes them."""

from __future__ import annotations

import pytest

from benchmarks.timeline import main, read, step_of
from tests.benchmarks.running import PNG
from tests.jobs import horovodrun, needs

BUCKET, DENSE = "allgather.dls.0.1.0", "allreduce.fc.bias"


def lane(number, tensor):
    return (
        f'{{"name": "process_name", "ph": "M", "pid": {number}, "args": {{"name": "{tensor}"}}}},\n'
        f'{{"name": "process_sort_index", "ph": "M", "pid": {number}, "args": '
        f'{{"sort_index": {number}}}}},\n'
    )


def operation(number, kind, start):
    """Rank 1 is ready at `start`, rank 0 20 ms later, and 10 ms after that all is done."""

    def event(kind, milliseconds, **more):
        fields = {"ph": kind, "ts": (start + milliseconds) * 1000, "pid": number, **more}
        return str(fields).replace("'", '"') + ",\n"

    return (
        event("B", 0, name=f"NEGOTIATE_{kind}")
        + event("X", 0, name="1", dur=0)
        + event("X", 20, name="0", dur=0)
        + event("E", 20)
        + event("B", 21, name=kind)
        + event("B", 22, name=f"GLOO_{kind}")
        + event("E", 29)
        + event("E", 30)
    )


@pytest.fixture
def text():
    """Three steps of a bucket and of a dense gradient; the job was killed, the end is missing."""
    steps = [
        operation(1, "ALLGATHER", at) + operation(2, "ALLREDUCE", at + 40) for at in (0, 100, 200)
    ]
    return "[\n" + lane(1, BUCKET) + lane(2, DENSE) + "".join(steps)


@pytest.mark.parametrize("end", ["", "]\n"])
def test_one_step_of_a_timeline(text, end):
    operations = read(text + end)
    assert [x.tensor for x in operations] == [BUCKET, DENSE] * 3
    first, second = step_of(operations, 1)
    assert (first.tensor, first.start, first.end) == (BUCKET, 0.1, 0.13)
    assert second.tensor == DENSE
    assert second.ready == {1: 0.14, 0: 0.16}
    assert [(p.name, p.depth) for p in second.phases] == [
        ("NEGOTIATE_ALLREDUCE", 0),
        ("GLOO_ALLREDUCE", 1),
        ("ALLREDUCE", 0),
    ]


def test_the_picture(text, tmp_path):
    pytest.importorskip("matplotlib")
    timeline, picture = tmp_path / "timeline.json", tmp_path / "timeline.png"
    timeline.write_text(text)
    assert main(["draw", str(timeline), str(picture)]) == 0
    assert picture.read_bytes().startswith(PNG)


def test_a_timeline_without_buckets_is_refused(tmp_path, capsys):
    timeline = tmp_path / "timeline.json"
    timeline.write_text("[\n" + lane(2, DENSE) + operation(2, "ALLREDUCE", 0))
    assert main(["draw", str(timeline), "none.png"]) == 2
    assert "no bucket's allgather" in capsys.readouterr().err


@needs("torch", "horovod", "matplotlib")
def test_the_timeline_of_a_real_job_has_its_buckets_and_can_be_drawn(tmp_path):
    timeline, picture = tmp_path / "timeline.json", tmp_path / "timeline.png"
    env = {"HOROVOD_TIMELINE": str(timeline), "HOROVOD_CACHE_CAPACITY": "0"}
    horovodrun(2, ["-m", "benchmarks.timeline", "train"], env=env)
    operations = step_of(read(timeline.read_text()), 1)
    kinds = [operation.tensor.partition(".")[0] for operation in operations]
    assert kinds == ["allgather"] * 3 + ["allreduce"] * 12  # buckets, layers of two tensors each
    assert all(operation.ready.keys() == {0, 1} for operation in operations)
    assert main(["draw", str(timeline), str(picture)]) == 0
    assert picture.read_bytes().startswith(PNG)
