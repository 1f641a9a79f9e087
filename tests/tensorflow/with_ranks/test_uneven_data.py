"""Ranks with different numbers of batches: see ``hvd_dls.tensorflow.join``."""

import horovod.tensorflow as hvd
import numpy as np
import pytest
import tensorflow as tf

from hvd_dls import DLSError
from hvd_dls.tensorflow import DLSCompressor, join
from tests.tensorflow.with_ranks.training import (
    SPARSE,
    Net,
    Trainer,
    assert_same_on_all_ranks,
    batch,
    cross_entropy,
    flat,
    held_on_all_ranks,
    traced,
    whole_numbers,
)


def count_of(rank, most_on="first"):
    """Batches of an epoch: the last rank, or the first, has none."""
    return 2 * (rank if most_on == "last" else hvd.size() - 1 - rank)


def dataset_of(steps):
    """As a rank reads its files: their number is not known beforehand."""
    images, labels = batch(0)
    specs = tf.TensorSpec(images.shape, images.dtype), tf.TensorSpec(labels.shape, labels.dtype)
    return tf.data.Dataset.from_generator(
        lambda: (batch(step) for step in steps), output_signature=specs
    )


@pytest.mark.parametrize("most_on", ["first", "last"])
def test_density_1_trains_as_horovod_does_with_zeros(mode, most_on):
    """What Horovod's join does, too: an average over all ranks."""
    mine = count_of(hvd.rank(), most_on)
    most = max(count_of(rank, most_on) for rank in range(hvd.size()))
    plain = Net()

    @traced
    def step(images, labels, weight):
        with tf.GradientTape() as tape:
            loss = cross_entropy(plain(images), labels) * weight
        gradients = tape.gradient(loss, plain.parameters)
        for i, (p, g) in enumerate(zip(plain.parameters, gradients, strict=True)):
            p.assign_sub(0.05 * hvd.allreduce(g, name=f"plain.{i}"))

    net = Net()
    compression = DLSCompressor(density=1.0, **SPARSE)
    trainer = Trainer(net, compression, mode)
    for epoch in range(2):
        steps = range(10 * epoch, 10 * epoch + mine)
        for number in range(most):
            step(*batch(10 * epoch + number), 1.0 if number < mine else 0.0)
        with join(dataset_of(steps)) as batches:
            seen = []
            for images, labels in batches:
                seen.append(batches.has_data)
                trainer._step(images, labels)
        assert seen == [number < mine for number in range(most)]
        assert batches.extra_steps == most - mine
        assert batches.last_rank == (0 if most_on == "first" else hvd.size() - 1)
        trainer._step(*batch(100 + epoch))  # outside, its gradients count on all ranks
        step(*batch(100 + epoch), 1.0)
    np.testing.assert_allclose(flat(net), flat(plain), rtol=1e-4, atol=1e-5)
    assert_same_on_all_ranks(flat(net))
    assert compression.last_step().step == 2 * most + 2


@pytest.mark.parametrize(
    "options",
    [{}, {"dense_steps": 1}, {"clip_value": 1000.0}, {"exchange": "sparse_allreduce"}],
    ids=str,
)
def test_nothing_is_lost_and_residuals_of_ranks_without_data_are_sent(options):
    """Sent + residual = accumulated, to the bit; what the template holds counts for nothing."""
    shapes = {"a": (40, 30), "bias": (30,), "b": (100, 30)}
    variables = [tf.Variable(tf.zeros(shape), name=name) for name, shape in shapes.items()]
    compression = DLSCompressor(density=0.05, **SPARSE, **options)
    nonsense = [np.full(shape, np.nan, np.float32) for shape in shapes.values()]

    @traced
    def step(gradients):
        with tf.GradientTape() as tape:
            loss = tf.add_n(
                [tf.reduce_sum(v * g) for v, g in zip(variables, gradients, strict=True)]
            )
        tape = hvd.DistributedGradientTape(tape, compression=compression, op=hvd.Sum)
        for v, g in zip(variables, tape.gradient(loss, variables), strict=True):
            v.assign_sub(g)

    mine = [
        [whole_numbers(shape, number) for shape in shapes.values()]
        for number in range(count_of(hvd.rank()))
    ]
    with join(mine, template=nonsense) as batches:
        for gradients in batches:
            step([tf.constant(g) for g in gradients])
    waits = held_on_all_ranks(compression)
    for (name, shape), v in zip(shapes.items(), variables, strict=True):
        accumulated = np.zeros(shape, np.float32)
        for rank in range(hvd.size()):
            for number in range(count_of(rank)):
                accumulated += whole_numbers(shape, number, rank)
        kept = waits.get(name, np.zeros(shape, np.float32)).reshape(shape)
        assert np.array_equal(kept - v.numpy(), accumulated)
    assert_same_on_all_ranks(flat(variables))
    assert_same_on_all_ranks(compression.last_step().k)


def test_last_batches_are_smaller_at_different_times():
    """So ranks trace the step anew at different times, and one must not wait for the others."""
    trainer = Trainer(Net(), DLSCompressor(density=0.05, **SPARSE), "tf.function")
    sizes = [6, 6, 6, 2] if hvd.rank() == 0 else [6, 3]
    for epoch in range(2):
        own = [batch(10 * epoch + number, size=size) for number, size in enumerate(sizes)]
        train(lambda of: trainer._step(*of), own)
        assert_same_on_all_ranks(flat(trainer.model))
    assert trainer.traces == 2


def test_a_function_traced_here_and_one_traced_later_meet_outside():
    """One rank goes on with the function that it traced in join, another one traces it anew."""
    trainer = Trainer(Net(), DLSCompressor(density=0.05, **SPARSE), "tf.function")
    train(lambda of: trainer._step(*of), [batch(number) for number in range(2)])
    for number in range(2, 4):
        trainer._step(*batch(number, size=6 + hvd.rank()))
    assert trainer.traces == 1 + (hvd.rank() > 0)
    assert_same_on_all_ranks(flat(trainer.model))


def train(step, batches):
    with join(batches) as joined:
        for one in joined:
            step(one)


def embedding_step(**options):
    """A training step of an embedding and a layer; and their variables."""
    table, out = tf.Variable(tf.ones([50, 16])), tf.Variable(tf.ones([16, 5]))
    compression = DLSCompressor(density=0.05, **SPARSE)

    @traced
    def step(words):
        with tf.GradientTape() as tape:
            loss = cross_entropy(tf.gather(table, words) @ out, words % 5)
        tape = hvd.DistributedGradientTape(tape, compression=compression, **options)
        for v, g in zip([table, out], tape.gradient(loss, [table, out]), strict=True):
            v.assign_sub(tf.convert_to_tensor(g))

    words = [tf.constant([hvd.rank(), number, 7], tf.int64) for number in range(4)]
    return step, words[: count_of(hvd.rank())], [table, out]


def test_embeddings():
    step, words, _ = embedding_step()
    with pytest.raises(DLSError, match="sparse_as_dense=True"):
        train(step, words)
    step, words, variables = embedding_step(sparse_as_dense=True)
    train(step, words)
    assert_same_on_all_ranks(flat(variables))


def test_what_join_refuses():
    trainer = Trainer(Net(), DLSCompressor(density=0.05, **SPARSE), "tf.function")
    trainer.train(range(2))
    before = flat(trainer.model)
    with pytest.raises(tf.errors.OpError, match="traced outside of join"):
        train(lambda of: trainer._step(*of), dataset_of(range(2)))
    assert np.array_equal(flat(trainer.model), before)
    with pytest.raises(DLSError, match="exchanged no gradients"):
        train(lambda of: None, dataset_of(range(2)))
    with pytest.raises(DLSError, match="zip the datasets"), join([]), join([]):
        pass
    with pytest.raises(DLSError, match="goes in a with"):
        next(iter(join([])))

    @traced
    def whole_epoch():
        with join(dataset_of(range(2))):
            pass

    with pytest.raises(DLSError, match="must run in Python"):
        whole_epoch()
    with join([]) as batches:
        assert list(batches) == []
    trainer.train(range(2))
    assert_same_on_all_ranks(flat(trainer.model))
