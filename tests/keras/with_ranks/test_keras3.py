"""Keras 3 on the TensorFlow backend, with hvd_dls.keras in Horovod's place."""

import os

import numpy as np
import pytest
import tensorflow as tf

if os.environ.get("TF_USE_LEGACY_KERAS") == "1":
    pytest.skip("tf_keras has its own job", allow_module_level=True)

import keras

import hvd_dls.keras as hvd
from hvd_dls import DLSError
from hvd_dls.tensorflow import DLSCompressor, binding
from tests.keras.with_ranks.training import (
    SPARSE,
    assert_nothing_is_lost,
    assert_same_on_all_ranks,
    by_a_loop_of_our_own,
    by_fit,
    data,
    flat,
    net,
)


def compressor(variables=None, density=0.05, **options):
    return DLSCompressor(variables, density=density, **SPARSE, **options)


COMPRESSIONS = {
    "none": lambda: hvd.Compression.none,
    "fp16": lambda: hvd.Compression.fp16,
    "dls": compressor,
}


@pytest.fixture(params=list(COMPRESSIONS))
def compression(request):
    return COMPRESSIONS[request.param]()


def sgd():
    return keras.optimizers.SGD(0.05, momentum=0.9)


def compiled(compression, optimizer=None, seed=1, run_eagerly=False, **options):
    model = net(keras, seed)
    model.compile(
        hvd.DistributedOptimizer(optimizer or sgd(), compression=compression, **options),
        "sparse_categorical_crossentropy",
        metrics=["accuracy"],
        run_eagerly=run_eagerly,
    )
    return model


def is_at_step(compression, step):
    return not isinstance(compression, DLSCompressor) or compression.last_step().step == step


def test_fit_with_a_smaller_last_batch(compression):
    model = compiled(compression)
    model.fit(*data(40), 16, epochs=3, verbose=0)
    assert is_at_step(compression, 9)
    assert_same_on_all_ranks(flat(model))


def test_without_us_ranks_drift_apart():
    """What the tests above would see if gradients were not averaged."""
    model = net(keras)
    model.compile(sgd(), "sparse_categorical_crossentropy")
    model.fit(*data(32), 16, verbose=0)
    with pytest.raises(AssertionError, match="differs from rank"):
        assert_same_on_all_ranks(flat(model))


def test_the_bare_class():
    class Bare(DLSCompressor):
        _default_instance = compressor()

    models = [compiled(Bare, seed=i) for i in range(2)]  # same shapes: each has its own optimizer
    for model in models:
        model.fit(*data(32), 16, epochs=2, verbose=0)
        assert_same_on_all_ranks(flat(model))
    assert [state["step"] for state in Bare.state_dict()["models"]] == [4, 4]
    assert Bare.last_step().names[0].endswith("conv/kernel")


@pytest.mark.parametrize("run_eagerly", [False, True])
def test_train_on_batch(compression, run_eagerly):
    model = compiled(compression, run_eagerly=run_eagerly)
    for number in range(4):
        model.train_on_batch(*data(16, number))
    assert is_at_step(compression, 4)
    assert_same_on_all_ranks(flat(model))


@pytest.mark.parametrize(("mode", "how"), [("eager", "apply_gradients"), ("tf.function", "apply")])
def test_custom_loop(compression, mode, how):
    model = net(keras)
    optimizer = hvd.DistributedOptimizer(sgd(), compression=compression)
    traces = []

    def step(images, labels):
        traces.append(1)
        with tf.GradientTape() as tape:
            losses = keras.losses.sparse_categorical_crossentropy(labels, model(images))
            loss = tf.reduce_mean(losses)
        gradients = tape.gradient(loss, model.trainable_variables)
        if how == "apply":
            optimizer.apply(gradients, model.trainable_variables)
        else:
            optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))

    run = tf.function(step) if mode == "tf.function" else step
    for number in range(5):
        run(*data(16, number))
    if mode == "tf.function":
        assert len(traces) <= 2
        run(*data(8, 5))
        run(*data(16, 6))
    assert is_at_step(compression, 7 if mode == "tf.function" else 5)
    assert_same_on_all_ranks(flat(model))


@pytest.mark.parametrize("train", [by_fit, by_a_loop_of_our_own])
def test_nothing_is_lost(train):
    compression = compressor(density=0.1)
    optimizer = hvd.DistributedOptimizer(
        keras.optimizers.SGD(1.0), compression=compression, op=hvd.Sum
    )
    assert_nothing_is_lost(keras, optimizer, compression, train)


@pytest.mark.parametrize("options", [{}, {"op": hvd.Sum}, {"gradient_predivide_factor": 1.5}])
def test_density_one_is_dense(options):
    trained = []
    for compression in (hvd.Compression.none, compressor(density=1)):
        model = compiled(compression, **options)
        model.fit(*data(32), 16, epochs=2, verbose=0, shuffle=False)
        trained.append(flat(model))
    np.testing.assert_allclose(*trained, rtol=1e-4, atol=1e-6)


def test_it_is_one_process_with_all_the_data():
    """Ranks with parts of a batch do what one process does with the whole."""
    parts = [np.random.default_rng(rank).normal(size=(8, 6)) for rank in range(hvd.size())]
    weights = []
    for batch, wrap in (
        (parts[hvd.rank()], hvd.DistributedOptimizer),
        (np.concatenate(parts), lambda o: o),
    ):
        model = keras.Sequential([keras.layers.Input((6,)), keras.layers.Dense(1, use_bias=False)])
        model.set_weights([np.ones((6, 1))])
        model.compile(wrap(sgd()), "mse")
        for _ in range(3):
            model.train_on_batch(batch, batch[:, :1])
        weights.append(flat(model))
    np.testing.assert_allclose(*weights, rtol=1e-5)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "bfloat16"])
def test_mixed_precision(compression, policy):
    keras.config.set_dtype_policy(policy)
    try:
        model = compiled(compression)
        model.fit(*data(32), 16, epochs=3, verbose=0)
    finally:
        keras.config.set_dtype_policy("float32")
    assert np.isfinite(flat(model)).all()
    assert_same_on_all_ranks(flat(model))


@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
@pytest.mark.parametrize("options", [{}, {"momentum": 0.5, "nonfinite": "skip"}], ids=str)
def test_passes_on_a_device_train_the_same_to_the_bit(policy, options, monkeypatch):
    """With loss scaling, they are in a branch of a condition."""
    trained = []
    keras.config.set_dtype_policy(policy)
    try:
        for there in (False, True):
            monkeypatch.setattr(binding, "stays_on_device", lambda variable, there=there: there)
            model = compiled(compressor(**options), keras.optimizers.SGD(0.05))
            model.fit(*data(32), 16, epochs=3, shuffle=False, verbose=0)
            trained.append(flat(model))
    finally:
        keras.config.set_dtype_policy("float32")
    assert np.isfinite(trained[0]).all()
    assert np.array_equal(*trained)
    assert_same_on_all_ranks(trained[1])


def test_an_overflow_on_one_rank_skips_the_step_on_all(compression):
    inner = keras.optimizers.LossScaleOptimizer(sgd(), initial_scale=8.0)
    optimizer = hvd.DistributedOptimizer(inner, compression=compression)
    variable = keras.Variable(np.ones((30, 40)))
    for step in range(4):
        gradient = np.full((30, 40), 8.0, np.float32)
        if step == 1 and hvd.rank() == 1:
            gradient[3, 4] = np.inf
        before = variable.numpy()
        optimizer.apply([tf.constant(gradient)], [variable])
        assert np.array_equal(before, variable.numpy()) == (step == 1)
    assert float(optimizer.dynamic_scale.numpy()) == 4.0
    assert is_at_step(compression, 3)
    assert_same_on_all_ranks(variable.numpy())


def test_residuals_follow_the_loss_scale():
    """Training is what it is without loss scaling, to the bit."""
    compressions = [DLSCompressor(density=0.1, **SPARSE) for _ in range(2)]
    scaled = keras.optimizers.LossScaleOptimizer(sgd(), initial_scale=16.0, dynamic_growth_steps=2)
    optimizers = [
        hvd.DistributedOptimizer(inner, compression=compression)
        for inner, compression in zip([sgd(), scaled], compressions, strict=True)
    ]
    variables = [keras.Variable(np.ones((30, 40))) for _ in optimizers]
    for step in range(7):
        drawn = np.random.default_rng([step, hvd.rank()]).integers(-50, 51, (30, 40))
        scale = float(optimizers[1].dynamic_scale.numpy()) if step else 16.0
        for optimizer, variable, factor in zip(optimizers, variables, [1.0, scale], strict=True):
            gradient = tf.constant(drawn.astype(np.float32) * factor)
            optimizer.apply([gradient], [variable])
        np.testing.assert_array_equal(variables[0].numpy(), variables[1].numpy())
    assert scale > 16
    assert_same_on_all_ranks(variables[1].numpy())


@pytest.mark.parametrize("eager", [True, False])
def test_a_skipped_step_changes_nothing(eager):
    compression = compressor(nonfinite="skip")
    optimizer = keras.optimizers.SGD(0.1, momentum=0.9, weight_decay=0.1)
    model = net(keras)
    model.compile(
        hvd.DistributedOptimizer(optimizer, compression=compression),
        "sparse_categorical_crossentropy",
        run_eagerly=eager,
    )
    model.train_on_batch(*data(16, 0))
    state = [*model.trainable_variables, *model.optimizer.variables]
    before = [np.asarray(v).tobytes() for v in state]
    images, labels = data(16, 1)
    if hvd.rank() == 1:
        images[0] = np.nan
    model.train_on_batch(images, labels)
    assert [np.asarray(v).tobytes() for v in state] == before
    model.get_layer("batch_normalization").moving_mean.assign(np.zeros(8))
    model.get_layer("batch_normalization").moving_variance.assign(np.ones(8))
    model.train_on_batch(*data(16, 2))
    assert [np.asarray(v).tobytes() for v in state] != before
    assert np.isfinite(flat(model)).all()
    assert is_at_step(compression, 2)
    assert compression.skipped_steps() == 1
    assert_same_on_all_ranks(flat(model))


def test_embeddings_alone_train_with_skipping():
    embedding = keras.Variable(np.ones((50, 16)), name="embedding")
    optimizer = hvd.DistributedOptimizer(sgd(), compression=compressor(nonfinite="skip"))
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(tf.gather(embedding.value, [1, 2]))
    optimizer.apply(tape.gradient(loss, [embedding.value]), [embedding])
    assert not np.array_equal(embedding.numpy(), np.ones((50, 16)))
    assert_same_on_all_ranks(embedding.numpy())


@pytest.mark.parametrize("theirs", ["momentum", "beta_1"])
def test_momentum_in_both_is_refused(theirs):
    kind = keras.optimizers.SGD if theirs == "momentum" else keras.optimizers.Adam
    ours = DLSCompressor(momentum=0.9)
    with pytest.raises(DLSError, match=f"make it with {theirs}=0"):
        hvd.DistributedOptimizer(kind(0.1, **{theirs: 0.9}), compression=ours)
    hvd.DistributedOptimizer(kind(0.1, **{theirs: 0.0}), compression=ours)


def test_embeddings_and_variables_without_gradient(compression):
    embedding = keras.Variable(np.ones((50, 16)), name="embedding")
    never = keras.Variable(np.ones((40, 40)), name="never")
    out = keras.Variable(np.ones((16, 64)), name="out")
    optimizer = hvd.DistributedOptimizer(sgd(), compression=compression)
    for step in range(3):
        words = np.random.default_rng([step, hvd.rank()]).integers(0, 50, 20)
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.gather(embedding.value, words) @ out.value)
        variables = [embedding, never, out]
        gradients = tape.gradient(loss, [v.value for v in variables])
        assert isinstance(gradients[0], tf.IndexedSlices)
        assert gradients[1] is None
        optimizer.apply(gradients, variables)
    for variable in variables:
        assert_same_on_all_ranks(variable.numpy())


def test_nan_moves_no_weight_on_any_rank():
    model = compiled(compressor())
    model.train_on_batch(*data(16, 0))
    before = flat(model)
    images, labels = data(16, 1)
    if hvd.rank() == 1:
        images[0] = np.nan
    with pytest.raises(tf.errors.OpError, match=r"NaN or Inf in .* on rank 1"):
        model.train_on_batch(images, labels)
    np.testing.assert_array_equal(flat(model), before)


def test_callbacks():
    model = compiled(hvd.Compression.none, seed=hvd.rank())
    seen = []
    history = model.fit(
        *data(32),
        16,
        epochs=3,
        verbose=0,
        callbacks=[
            hvd.callbacks.BroadcastGlobalVariablesCallback(0),
            hvd.callbacks.MetricAverageCallback(),
            hvd.callbacks.LearningRateWarmupCallback(0.08, warmup_epochs=2),
            hvd.callbacks.LearningRateScheduleCallback(0.08, 0.5, start_epoch=2),
            keras.callbacks.LambdaCallback(
                on_train_batch_end=lambda batch, logs: seen.append(
                    float(model.optimizer.learning_rate)
                )
            ),
        ],
    ).history
    assert_same_on_all_ranks(flat(model))
    assert_same_on_all_ranks(np.array(history["loss"]))
    assert_same_on_all_ranks(np.array(history["accuracy"]))
    p = hvd.size()
    warm = [0.08 / p * ((i + 1) / 2 * (p - 1) / 2 + 1) for i in range(4)]
    np.testing.assert_allclose(seen, [*warm, 0.08, 0.08], rtol=1e-6)
    np.testing.assert_allclose(history["lr"], [warm[1], warm[3], 0.08], rtol=1e-6)


def test_broadcast_spares_local_variables_and_takes_optimizer_state():
    model = compiled(hvd.Compression.none, keras.optimizers.Adam(0.01 * (1 + hvd.rank())))
    model.layers[-1].bias.assign(np.full(5, float(hvd.rank())))
    local = model.layers[-1].bias
    callback = hvd.callbacks.BroadcastGlobalVariablesCallback(0, local_variables=local)
    callback.set_model(model)
    callback.on_train_batch_end(0)
    assert float(model.optimizer.learning_rate) == pytest.approx(0.01)
    np.testing.assert_array_equal(local.numpy(), float(hvd.rank()))


def test_momentum_is_corrected_when_the_learning_rate_changes():
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1, momentum=0.5))
    model = keras.Sequential([keras.layers.Input((1,)), keras.layers.Dense(1, use_bias=False)])
    model.compile(optimizer, "mse")
    model.set_weights([np.ones((1, 1))])
    callback = hvd.callbacks.LearningRateScheduleCallback(0.1, lambda epoch: 2.0**epoch)
    x = np.ones((4, 1))
    model.fit(x, 0 * x, 4, epochs=2, verbose=0, callbacks=[callback], shuffle=False)
    v = -0.1 * 2 * 1.0
    w = 1 + v
    v = 0.5 * (0.2 / 0.1) * v - 0.2 * 2 * w
    np.testing.assert_allclose(flat(model), [w + v], rtol=1e-5)


def test_saved_and_loaded_without_horovod_and_trained_on(tmp_path):
    model = compiled(compressor())
    model.fit(*data(32), 16, epochs=2, verbose=0)
    file = str(tmp_path / "model.keras")
    model.save(file)
    plain = keras.saving.load_model(file)
    assert type(plain.optimizer) is keras.optimizers.SGD
    assert "hvd" not in str(plain.get_compile_config())
    for saved, own in zip(plain.optimizer.variables, model.optimizer.variables, strict=True):
        np.testing.assert_array_equal(saved.numpy(), own.numpy())
    again = hvd.load_model(file, compression=compressor())
    assert int(again.optimizer.iterations) == 4
    np.testing.assert_array_equal(
        again.optimizer.variables[2].numpy(), model.optimizer.variables[2].numpy()
    )
    again.fit(*data(32), 16, verbose=0)
    assert int(again.optimizer.iterations) == 6
    assert_same_on_all_ranks(flat(again))


def test_jit_compile_is_off_and_asking_for_it_is_refused(monkeypatch):
    gpu = tf.config.PhysicalDevice("/physical_device:GPU:0", "GPU")
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind=None: [gpu])
    plain = net(keras)
    plain.compile(sgd(), "mse")
    assert plain.jit_compile  # what Keras does where there is a GPU
    model = compiled(compressor())
    assert not model.jit_compile
    with pytest.raises(DLSError, match="XLA"):
        model.compile(model.optimizer, "mse", jit_compile=True)


def test_refusals():
    optimizer = hvd.DistributedOptimizer(sgd())
    with pytest.raises(DLSError, match="already"):
        hvd.DistributedOptimizer(optimizer)
    with pytest.raises(DLSError, match="goes inside"):
        keras.optimizers.LossScaleOptimizer(optimizer)
    with pytest.raises(DLSError, match="no Keras 3 optimizer"):
        hvd.DistributedOptimizer("sgd")
    with pytest.raises(DLSError, match="op="):
        hvd.DistributedOptimizer(sgd(), op=2)
    with pytest.raises(DLSError, match="only with op"):
        hvd.DistributedOptimizer(sgd(), op=hvd.Sum, gradient_predivide_factor=2)


@pytest.mark.parametrize("module", ["horovod.tensorflow", "horovod.keras"])
@pytest.mark.parametrize("compression", [DLSCompressor, DLSCompressor()])
def test_horovods_own_wrapper_refuses_to_train_without_averaging(module, compression):
    import importlib

    horovod = importlib.import_module(module)
    with pytest.raises(DLSError, match=r"hvd_dls\.keras\.DistributedOptimizer"):
        horovod.DistributedOptimizer(sgd(), compression=compression)


@pytest.mark.skipif(
    "int(os.environ['HVD_DLS_TEST_RANKS']) < 4", reason="needs two process sets of two ranks"
)
def test_process_sets(compression):
    halves = [hvd.add_process_set([0, 1]), hvd.add_process_set([2, 3])]
    model = compiled(compression, process_set=halves[hvd.rank() // 2])
    model.fit(*data(32), 16, epochs=2, verbose=0)
    everyone = hvd.allgather(tf.constant(flat(model)[None]), name="sets").numpy()
    np.testing.assert_array_equal(everyone[0], everyone[1])
    np.testing.assert_array_equal(everyone[2], everyone[3])
    assert not np.array_equal(everyone[0], everyone[2])
    for process_set in halves:
        hvd.remove_process_set(process_set)
