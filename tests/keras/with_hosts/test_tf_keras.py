"""tf_keras (Keras 2) with Horovod's own optimizer, on several hosts."""

import horovod.tensorflow.keras as hvd
import tensorflow as tf

from hvd_dls.tensorflow import DLSCompressor
from tests.keras.with_ranks.training import SPARSE, assert_same_on_all_ranks, data, flat, net

keras = tf.keras


def test_fit():
    model = net(keras)
    compression = DLSCompressor(density=0.05, hierarchical=True, **SPARSE)
    optimizer = keras.optimizers.SGD(0.05, momentum=0.9)
    optimizer = hvd.DistributedOptimizer(optimizer, compression=compression)
    model.compile(optimizer, "sparse_categorical_crossentropy")
    images, labels = data(40)  # 16 + 16 + 8: a smaller last batch
    model.fit(images, labels, 16, epochs=3, verbose=0)
    assert compression.last_step().step == 9
    assert compression._bindings[0].session.groups.sizes == (2, 2)
    assert_same_on_all_ranks(flat(model))
