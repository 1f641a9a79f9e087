"""What a parameter's shape tells."""

import numpy as np
import pytest

from hvd_dls.core.balancing.layers import layer_spec
from hvd_dls.errors import DLSError


@pytest.mark.parametrize(
    ("torch_shape", "tensorflow_shape", "kind", "kernel", "fan_in", "fan_out"),
    [
        ((64, 3, 7, 7), (7, 7, 3, 64), "conv", 49, 3, 64),
        ((8, 4, 1, 5), (1, 5, 4, 8), "conv", 5, 4, 8),
        ((8, 4, 3), (3, 4, 8), "conv", 3, 4, 8),
        ((8, 4, 3, 2, 2), (3, 2, 2, 4, 8), "conv", 12, 4, 8),
        ((32, 1, 3, 3), (3, 3, 1, 32), "conv", 9, 1, 32),
        ((10, 84), (84, 10), "linear", 1, 84, 10),
        ((64,), (64,), "vector", 1, 1, 64),
        ((), (), "vector", 1, 1, 1),
        ((8, 4, 2, 2, 2, 2), (2, 2, 2, 2, 4, 8), "other", 16, 4, 8),
    ],
)
def test_both_layouts_tell_the_same(torch_shape, tensorflow_shape, kind, kernel, fan_in, fan_out):
    for layout, shape in (("torch", torch_shape), ("tensorflow", tensorflow_shape)):
        layer = layer_spec("w", shape, layout)
        assert (layer.kind, layer.kernel) == (kind, kernel)
        assert (layer.fan_in, layer.fan_out) == (fan_in, fan_out)
        assert layer.size == np.prod(shape, dtype=int)


@pytest.mark.parametrize(("itemsize", "work"), [(2, "float32"), (4, "float32"), (8, "float64")])
def test_residuals_are_never_narrower_than_float32(itemsize, work):
    assert layer_spec("w", (3, 3), itemsize=itemsize).work_dtype == work


def test_an_unknown_layout_is_refused():
    with pytest.raises(DLSError, match="layout='keras': accepted are 'torch', 'tensorflow'"):
        layer_spec("w", (3, 3), "keras")
