"""Before the first exchange: what the ranks' fingerprints tell."""

import dataclasses

import numpy as np
import pytest

from hvd_dls.config import DLSConfig
from hvd_dls.core.balancing.layers import layer_spec
from hvd_dls.core.wire.agreement import check_agreement, digest
from hvd_dls.errors import DLSError

CONFIG = DLSConfig()
LAYERS = (layer_spec("a", (32, 64)), layer_spec("b", (64,)))


def gathered(*ranks):
    return np.concatenate([digest(config, layers) for config, layers in ranks])


def test_equal_ranks_agree():
    check_agreement(gathered(*[(DLSConfig(), LAYERS)] * 5), 5)
    check_agreement(gathered((CONFIG, LAYERS)), 1)
    assert np.array_equal(digest(CONFIG, LAYERS), digest(CONFIG, list(LAYERS)))


@pytest.mark.parametrize(
    "option",
    [{"density": 0.011}, {"strategy": "layerwise"}, {"pair_steps": 4}, {"measure_every": 1}],
)
def test_other_options_are_told_with_their_ranks(option):
    other = dataclasses.replace(CONFIG, **option)
    digests = gathered((CONFIG, LAYERS), (other, LAYERS), (CONFIG, LAYERS), (other, LAYERS))
    with pytest.raises(DLSError, match=r"rank\(s\) \[1, 3\] have other options .* than rank 0"):
        check_agreement(digests, 4)


@pytest.mark.parametrize(
    "layers",
    [
        LAYERS[:1],
        LAYERS[::-1],
        (layer_spec("x", (32, 64)), LAYERS[1]),
        (layer_spec("a", (64, 32)), LAYERS[1]),
        (layer_spec("a", (32, 64), itemsize=8), LAYERS[1]),
    ],
    ids=["fewer", "other order", "other name", "other shape", "other type"],
)
def test_other_parameters_are_told_with_their_ranks(layers):
    digests = gathered((CONFIG, LAYERS), (CONFIG, LAYERS), (CONFIG, layers))
    with pytest.raises(DLSError, match=r"rank\(s\) \[2\] have other parameters .* than rank 0"):
        check_agreement(digests, 3)
