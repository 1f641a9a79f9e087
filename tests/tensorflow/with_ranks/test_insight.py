"""What can be seen of a training: statistics, and logs of it."""

from dataclasses import asdict

import horovod.tensorflow as hvd
import numpy as np
import pytest
import tensorflow as tf

from hvd_dls.core.session.stopwatch import PARTS
from hvd_dls.insight.reading import read_run
from hvd_dls.tensorflow import DLSCompressor
from tests.tensorflow.with_ranks.training import SPARSE, Net, Trainer


@pytest.mark.parametrize("mode", ["eager", "tf.function"])
def test_statistics_and_logs_are_those_of_the_steps_that_were_made(mode, tmp_path):
    model = Net()
    compression = DLSCompressor(density=0.05, **SPARSE)
    trainer = Trainer(model, compression, mode)
    assert compression.stats() is None
    records = []
    with (
        compression.log_to(tmp_path / "{rank}.jsonl", every=3),
        compression.log_to(tf.summary.create_file_writer(str(tmp_path / "summary")), every=3),
    ):
        for step in range(7):
            trainer.train([step])
            records.append(compression.last_step())
    stats = compression.stats(window=4)
    assert (stats.rank, stats.world_size, stats.step) == (hvd.rank(), hvd.size(), 7)
    for period, of in ((stats.window, records[-4:]), (stats.all, records)):
        assert period.entries == sum(int(record.k.sum()) for record in of)
        assert period.sparse_bytes == sum(record.sparse_bytes for record in of)
        whole = sum(int(tf.size(p)) * p.dtype.size for p in model.parameters)
        assert period.whole_bytes == len(of) * whole
        seconds = asdict(period.seconds)
        assert seconds["average"] == 0
        assert all(seconds[part] > 0 for part in PARTS if part != "average")
        assert seconds["total"] == pytest.approx(sum(seconds[part] for part in PARTS))
        assert seconds["total"] <= 1.001 * period.elapsed
    (log,) = read_run(tmp_path / f"{hvd.rank()}.jsonl").models
    assert log.steps.tolist() == [1, 3, 6]
    assert log.layers == list(records[0].names)
    for row, step in enumerate(log.steps.tolist()):
        assert log.k[row].tolist() == records[step - 1].k.tolist()
    seen = scalars(tmp_path / "summary")
    assert [step for step, _ in seen["dls/density"]] == [1, 3, 6]
    spread = records[5].threshold_spread()
    if np.isfinite(spread):
        assert seen["dls/spread"][-1] == (6, pytest.approx(spread, rel=1e-5))


def scalars(folder):
    """Steps and values of what ``tf.summary`` has written, by tag."""
    seen = {}
    for file in sorted(folder.iterdir()):
        for record in tf.data.TFRecordDataset(str(file)):
            event = tf.compat.v1.Event.FromString(record.numpy())
            for value in event.summary.value:
                number = float(tf.make_ndarray(value.tensor))
                seen.setdefault(value.tag, []).append((event.step, number))
    return seen
