"""A program as those that come with Horovod: its calls and arguments, with our import in place.

    horovodrun -np 2 python tests/keras/like_horovods_example.py FOLDER

Differences, which Keras 3 makes: ``compile`` has no ``experimental_run_tf_function``, an optimizer
no ``lr``, and files of whole models end in ``.keras``.
"""

import sys
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits

import hvd_dls.keras as hvd

hvd.init()
for gpu in (gpus := tf.config.list_physical_devices("GPU")):
    tf.config.experimental.set_memory_growth(gpu, True)
if gpus:
    tf.config.set_visible_devices(gpus[hvd.local_rank()], "GPU")
compression = hvd.DLSCompressor(density=0.05) if "--dls" in sys.argv else hvd.Compression.none

images, labels = load_digits(return_X_y=True)
images = images.astype(np.float32).reshape(-1, 8, 8, 1) / 16
dataset = tf.data.Dataset.from_tensor_slices((images, labels)).repeat().shuffle(2000).batch(64)

layers = keras.layers
model = keras.Sequential(
    [  # without an input: it is built in its first step
        layers.Conv2D(16, [3, 3], activation="relu"),
        layers.MaxPooling2D(pool_size=(2, 2)),
        layers.Dropout(0.25),
        layers.Flatten(),
        layers.Dense(64, activation="relu"),
        layers.Dropout(0.5),
        layers.Dense(10, activation="softmax"),
    ]
)
scaled_lr = 0.002 * hvd.size()
optimizer = hvd.DistributedOptimizer(
    keras.optimizers.Adam(scaled_lr),
    compression=compression,
    backward_passes_per_step=1,
    average_aggregated_gradients=True,
)
model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(), metrics=["accuracy"])
callbacks = [
    hvd.callbacks.BroadcastGlobalVariablesCallback(0),
    hvd.callbacks.MetricAverageCallback(),
    hvd.callbacks.LearningRateWarmupCallback(initial_lr=scaled_lr, warmup_epochs=2, verbose=1),
    keras.callbacks.ReduceLROnPlateau(patience=10, verbose=1),
]
last = Path(sys.argv[1], "checkpoint.keras")
if hvd.rank() == 0:
    callbacks.append(keras.callbacks.ModelCheckpoint(str(last)))
verbose = 2 if hvd.rank() == 0 else 0
steps = 60 // hvd.size()
model.fit(dataset, steps_per_epoch=steps, callbacks=callbacks, epochs=4, verbose=verbose)

weights = np.concatenate([np.ravel(w) for w in model.get_weights()])
everyone = hvd.allgather(weights[None], "weights").numpy()
assert (everyone == everyone[0]).all(), "ranks have drifted apart"
again = hvd.load_model(str(last), compression=compression)
_, accuracy = again.evaluate(images, labels, verbose=0)
print(f"accuracy {accuracy:.3f}")
