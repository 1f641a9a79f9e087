"""What can be seen of a training: statistics, and logs of it."""

import copy
import dataclasses
import json
from pathlib import Path

import horovod.torch as hvd
import numpy as np
import pytest
import torch

from hvd_dls.core.session.stopwatch import PARTS
from hvd_dls.errors import DLSError
from hvd_dls.insight.reading import read_run
from hvd_dls.torch import DLSCompressor
from tests.torch.with_ranks.test_training_options import poisoned
from tests.torch.with_ranks.training import SPARSE, net, net_without_vectors, train, wrap


@pytest.fixture
def folder(tmp_path_factory):
    """The same folder on all ranks."""
    path = hvd.broadcast_object(str(tmp_path_factory.mktemp("insight")), name="folder")
    return Path(path)


def whole_bytes(model):
    return sum(p.numel() * p.element_size() for p in model.parameters())


def test_statistics_are_those_of_the_steps_that_were_made():
    model = net()
    compression = DLSCompressor(density=0.05, nonfinite="skip", **SPARSE)
    optimizer = wrap(model, compression)
    assert compression.stats() is None
    records = []
    for step in range(12):
        train(model, optimizer, [step])
        records.append(compression.last_step())
        if step == 5:
            poisoned(model, optimizer, step, "3.weight")
    stats = compression.stats(window=8)
    assert (stats.rank, stats.world_size, stats.step, stats.skipped) == (
        hvd.rank(),
        hvd.size(),
        12,
        1,
    )
    for period, of in ((stats.last, records[-1:]), (stats.window, records[-8:])):
        assert period.steps == len(of)
        assert period.entries == sum(int(record.k.sum()) for record in of)
        assert period.sparse_bytes == sum(record.sparse_bytes for record in of)
        assert period.dense_bytes == sum(record.dense_bytes for record in of)
        assert period.payloads == len(of)  # one bucket
        np.testing.assert_allclose(
            period.densities, sum(record.k for record in of) / len(of) / records[0].sizes
        )
    assert (stats.all.steps, stats.all.skipped) == (12, 1)
    assert (stats.window.skipped, stats.last.skipped) == (1, 0)
    assert stats.all.whole_bytes == 12 * whole_bytes(model)
    ranks = hvd.size()
    ring = 2 * (ranks - 1) / ranks
    assert stats.last.link_bytes == round(
        (ranks - 1) * stats.last.sparse_bytes + ring * stats.last.dense_bytes
    )
    assert stats.thresholds.tolist() == records[-1].thresholds.tolist()
    json.loads(json.dumps(stats.as_dict(), allow_nan=False))


@pytest.mark.parametrize("strategy", ["dls", "layerwise", "global", "norm", "hard"])
def test_time_is_told_by_part_with_each_strategy(strategy):
    model = net()
    own = {"threshold": 0.01} if strategy == "hard" else {}
    compression = DLSCompressor(density=0.05, strategy=strategy, **own, **SPARSE)
    train(model, wrap(model, compression), range(6))
    period = compression.stats(window=4).window
    seconds = dataclasses.asdict(period.seconds)
    assert seconds["average"] == 0
    assert all(seconds[part] > 0 for part in PARTS if part != "average")
    # The parts follow one another on one thread, and are within the whole.
    assert sum(seconds[part] for part in PARTS) <= seconds["total"] <= 1.001 * period.elapsed


def test_a_log_on_every_rank_is_read_as_it_was(folder):
    model = net()
    compression = DLSCompressor(density=0.05, **SPARSE)
    optimizer = wrap(model, compression)
    records = []
    with (
        compression.log_to(folder / "{rank}.jsonl", every=4),
        compression.log_to(folder / "one.jsonl", every=1),
    ):
        for step in range(10):
            train(model, optimizer, [step])
            records.append(compression.last_step())
    train(model, optimizer, [10])  # not logged any more
    run = read_run(folder / f"{hvd.rank()}.jsonl")
    (log,) = run.models
    assert (log.rank, log.world_size) == (hvd.rank(), hvd.size())
    assert log.layers == list(records[0].names)
    assert log.sizes.tolist() == records[0].sizes.tolist()
    assert log.steps.tolist() == [1, 4, 8]
    for row, step in enumerate(log.steps.tolist()):
        assert log.k[row].tolist() == records[step - 1].k.tolist()
        np.testing.assert_allclose(log.thresholds[row], records[step - 1].thresholds, rtol=1e-5)
    assert log.column("steps").tolist() == [1, 3, 4]
    sent = [record.sparse_bytes for record in records]
    assert log.column("sparse_bytes").tolist() == [sent[0], sum(sent[1:4]), sum(sent[4:8])]
    hvd.allreduce(torch.zeros(1), name="all have written")
    (of_rank_0,) = read_run(folder / "one.jsonl").models
    assert of_rank_0.rank == 0
    assert of_rank_0.steps.tolist() == list(range(1, 11))


class Writer:
    """What torch's and tensorboardX's SummaryWriter have in common."""

    def __init__(self):
        self.scalars = {}

    def add_scalar(self, tag, scalar_value, global_step=None):
        self.scalars.setdefault(tag, []).append((global_step, scalar_value))


def test_a_writer_gets_scalars_and_a_function_lines():
    model, writer, lines = net(), Writer(), []
    compression = DLSCompressor(density=0.05, **SPARSE)
    logs = [compression.log_to(writer, every=2), compression.log_to(lines.append, every=3)]
    train(model, wrap(model, compression), range(6))
    stats = compression.stats()
    for log in logs:
        log.close()
    assert [step for step, _ in writer.scalars["dls/density"]] == [1, 2, 4, 6]
    assert writer.scalars["dls/spread"][-1][1] == pytest.approx(stats.spread)
    assert writer.scalars["dls/bytes/dense training"][-1][1] == whole_bytes(model)
    assert [line["kind"] for line in lines] == ["model", "step", "step", "step"]


def test_a_log_that_fails_on_one_rank_ends_and_training_goes_on(folder, caplog):
    model = net()
    compression = DLSCompressor(density=0.05, **SPARSE)
    (folder / "file").touch()
    log = compression.log_to(folder / "file" / "run.jsonl", every=1)
    train(model, wrap(model, compression), range(4))
    log.close()
    told = [record.getMessage() for record in caplog.records if "log to" in record.getMessage()]
    assert len(told) == (hvd.rank() == 0)
    assert compression.last_step().step == 4


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"target": 3}, "log_to(3)"),
        ({"target": "x", "every": 0}, "every=0"),
        ({"target": "x", "every": 2.0}, "every=2.0"),
    ],
)
def test_what_cannot_be_logged_to_is_refused(options, told):
    with pytest.raises(DLSError) as error:
        DLSCompressor(density=0.05).log_to(**options)
    assert told in str(error.value)


def test_each_of_several_models_can_be_asked_for():
    compression = DLSCompressor(density=0.05, **SPARSE)
    assert compression.stats(model=0) is None
    models = [net(), net_without_vectors()]
    optimizers = [wrap(model, compression) for model in models]
    for count, model, optimizer in zip((3, 2), models, optimizers, strict=True):
        train(model, optimizer, range(count))
    assert [compression.stats(model=number).step for number in (0, 1)] == [3, 2]
    assert compression.stats().step == 2
    for model in (2, -1, "net"):
        with pytest.raises(DLSError, match=r"2 model\(s\) have trained .* 0 to 1"):
            compression.stats(model=model)


@pytest.mark.parametrize("window", [0, 1001, 1.5, True])
def test_a_window_that_is_none_is_refused(window):
    model = net()
    compression = DLSCompressor(density=0.05, **SPARSE)
    train(model, wrap(model, compression), range(1))
    with pytest.raises(DLSError, match="window="):
        compression.stats(window)


def test_a_compressor_with_a_log_is_not_copied():
    compression = DLSCompressor(density=0.05)
    log = compression.log_to("never opened.jsonl")
    with pytest.raises(DLSError, match="a log"):
        copy.deepcopy(compression)
    log.close()
    assert copy.deepcopy(compression).config == compression.config
    assert not Path("never opened.jsonl").exists()
