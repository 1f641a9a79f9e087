"""What elastic training saves and goes back to; real elastic jobs are in tests/elastic."""

import copy

import horovod.tensorflow as hvd
import numpy as np
import pytest
import tensorflow as tf
from horovod.common.elastic import ObjectState

from hvd_dls import DLSError
from hvd_dls.adapter import World
from hvd_dls.core.session.groups import Groups
from hvd_dls.tensorflow import DLSCompressor, elastic
from hvd_dls.tensorflow.lost_ranks import tells_of_a_lost_rank
from tests.restart import restart_horovod
from tests.tensorflow.with_ranks.training import (
    SPARSE,
    Net,
    Trainer,
    assert_same_on_all_ranks,
    batch,
    flat,
)


def compressor(**options):
    return DLSCompressor(density=0.05, **SPARSE, **options)


def residuals(compression):
    (model,) = compression.state_dict()["models"]
    return np.concatenate([np.array(r) for r in model["residuals"].values()])


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("eager", {"momentum": 0.5}),
        ("tf.function", {"dense_steps": 2, "prior": "weight_norm"}),
    ],
)
def test_training_goes_on_from_what_was_saved(mode, options):
    """As if the steps in between had not been; also from before the first one."""
    for saved_after in (0, 3):
        compression, model = compressor(**options), Net()
        trainer = Trainer(model, compression, mode)
        state = elastic.TensorFlowState(model.parameters, compression=compression, step=0)
        trainer.train(range(saved_after))
        state.step = saved_after
        state.save()
        trainer.train(range(saved_after, 6))
        once = flat(model), residuals(compression)
        state.step = 6
        state.restore()
        assert state.step == saved_after
        restart_horovod(hvd)
        trainer.train(range(saved_after, 6))
        np.testing.assert_array_equal(flat(model), once[0])
        np.testing.assert_array_equal(residuals(compression), once[1])
        assert compression.last_step().step == 6
        assert_same_on_all_ranks(flat(model))


def test_a_state_is_loaded_into_a_function_that_was_traced_behind_the_dense_steps():
    compression, model = compressor(dense_steps=2), Net()
    trainer = Trainer(model, compression, "tf.function")
    trainer.train(range(1))
    saved, weights = compression.state_dict(), [p.numpy() for p in model.parameters]
    saved["models"][0]["residuals"] = {
        k: r.copy() for k, r in saved["models"][0]["residuals"].items()
    }
    trainer.train(range(1, 4))
    expected = flat(model)
    later = Trainer(model, compression, "tf.function")
    later.train([4])
    compression.load_state_dict(saved)
    for parameter, value in zip(model.parameters, weights, strict=True):
        parameter.assign(value)
    later.train(range(1, 4))
    np.testing.assert_array_equal(flat(model), expected)


def test_sync_leaves_residuals_where_they_are():
    compression, model = compressor(), Net(seed=hvd.rank())
    hvd.broadcast_variables(model.parameters, 0)
    trainer = Trainer(model, compression, "eager")
    trainer.train(range(3))
    model.parameters[0].assign_add(tf.fill(model.parameters[0].shape, float(hvd.rank())))
    state = elastic.TensorFlowState(model.parameters, compression=compression, step=hvd.rank())
    mine = residuals(compression).copy()
    state.sync()
    assert state.step == 0
    assert_same_on_all_ranks(flat(model))
    np.testing.assert_array_equal(residuals(compression), mine)
    assert (hvd.allgather(tf.constant([mine.sum()])).numpy() != mine.sum()).sum() == 1
    # What a newcomer has loaded is older than the weights.
    newcomer = compressor()
    newcomer.load_state_dict(copy.deepcopy(compression.state_dict()))
    given = newcomer if hvd.rank() else compression
    elastic.TensorFlowState(model.parameters, compression=given).sync()
    assert bool(newcomer.state_dict()["models"]) == (hvd.rank() == 0)


def test_a_compressor_is_found_wherever_it_is_given():
    """Never broadcast, as a plain value would be."""
    model = Net()
    other = compressor()
    for given in ({"compression": other}, {"compressor": other}, {"compression": [other]}, {}):
        state = elastic.TensorFlowState(model.parameters, step=0, **given)
        assert other in state._compressors()
        assert "compressor" not in state._saved_state
        state.sync()
    assert state._compressors() == DLSCompressor.living()
    given = elastic.TensorFlowState(model.parameters, compression=DLSCompressor)
    assert given._compressors() == [DLSCompressor._default()]


def test_horovods_own_run_is_refused(monkeypatch):
    """With a state of ours at once; with its own when the compressor begins."""
    model, words = Net(), r"Decorate with\s+hvd_dls.tensorflow.elastic.run"
    with pytest.raises(DLSError, match=words):
        hvd.elastic.run(lambda state: None)(elastic.TensorFlowState(model.parameters))
    monkeypatch.setenv("HOROVOD_ELASTIC", "1")
    trainer = Trainer(model, compressor(), "eager")
    with pytest.raises(Exception, match=words):
        hvd.elastic.run(lambda state: trainer.train([0]))(ObjectState(None, hvd.rank))


def test_an_error_of_training_is_raised():
    """And not taken for the loss of a rank, nor for the end of training."""
    model, compression = Net(), compressor()
    trainer = Trainer(model, compression, "tf.function")
    state = elastic.TensorFlowState(model.parameters, compression=compression)

    @elastic.run
    def train(state):
        trainer.train(range(1))
        model.parameters[-1].assign(tf.fill(model.parameters[-1].shape, np.nan))
        trainer.train(range(1))

    with pytest.raises(tf.errors.UnknownError, match="NonFiniteGradientError"):
        train(state)
    assert not tells_of_a_lost_rank(DLSError("HorovodAllgather"))


def test_what_elastic_jobs_cannot_do_is_refused(monkeypatch):
    monkeypatch.setenv("HOROVOD_ELASTIC", "1")
    with pytest.raises(Exception, match="hierarchical=True in an elastic job"):
        Trainer(Net(), compressor(hierarchical=True), "eager").train([0])
    alone = [hvd.add_process_set([rank]) for rank in range(hvd.size())]
    with pytest.raises(Exception, match="a process set in an elastic job"):
        Trainer(Net(), compressor(), "eager", process_set=alone[hvd.rank()]).train([0])
    for process_set in alone:
        hvd.remove_process_set(process_set)


def test_which_layers_are_compressed_does_not_follow_the_number_of_ranks(monkeypatch):
    monkeypatch.setenv("HOROVOD_ELASTIC", "1")
    compression = DLSCompressor(density=0.05, dense_below=0)
    Trainer(Net(), compression, "eager").train([0])
    (binding,) = compression._bindings
    alone, many = (
        binding._new_session(World(0, size, 1, 0), Groups.of_one(size, 0), None) for size in (1, 64)
    )
    assert [b.layers for b in alone.routing.buckets] == [b.layers for b in many.routing.buckets]
    assert alone.routing.buckets


@pytest.mark.parametrize("variables", [None, [], [1]])
def test_a_state_needs_variables(variables):
    with pytest.raises(DLSError, match=r"variables takes a list of tf\.Variable"):
        elastic.TensorFlowState(variables)


def test_two_models_in_a_function_that_runs_beside_a_newcomer_that_traces(monkeypatch):
    """The newcomer compares notes while it traces, the others when they run: nobody waits."""

    def started():
        compressions = [compressor() for _ in range(2)]
        nets = [Net(seed=number) for number in range(2)]
        pairs = zip(nets, compressions, strict=True)
        trainers = [Trainer(net, compression, "plain") for net, compression in pairs]

        @tf.function
        def step(images, labels):
            for trainer in trainers:
                trainer.step(images, labels)

        state = elastic.TensorFlowState([p for net in nets for p in net.parameters])
        return step, nets, compressions, state

    monkeypatch.setenv("HOROVOD_ELASTIC", "1")
    step, nets, compressions, state = started()
    for number in range(3):
        step(*batch(number))
    monkeypatch.delenv("HOROVOD_ELASTIC")  # horovodrun would be asked for a rank of the new world
    restart_horovod(hvd)
    monkeypatch.setenv("HOROVOD_ELASTIC", "1")
    if hvd.rank() == 1:
        step, nets, compressions, state = started()
    state.sync()
    for number in range(3, 6):
        step(*batch(number))
    for net, compression in zip(nets, compressions, strict=True):
        assert compression.last_step().step == 6
        (model,) = compression.state_dict()["models"]
        assert_same_on_all_ranks(flat(net))
        assert_same_on_all_ranks(np.asarray(model["ratios"]))
