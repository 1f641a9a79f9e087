"""Ranks that differ are told so, all of them; what is a rank's own affair makes no difference."""

import re
from collections import OrderedDict

import horovod.torch as hvd
import pytest
import torch
from torch import nn

import hvd_dls
from hvd_dls import DLSError
from hvd_dls.adapter import binding
from hvd_dls.core.wire import agreement
from hvd_dls.torch import DLSCompressor
from tests.torch.with_ranks.training import (
    SPARSE,
    assert_same_on_all_ranks,
    flat,
    net_without_vectors,
    train,
    wrap,
)


def odd() -> bool:
    """Whether this rank is the one that differs: the last."""
    return hvd.rank() == hvd.size() - 1


def layered(first="hidden", width=32, more=False) -> nn.Sequential:
    layers = OrderedDict(flatten=nn.Flatten())
    layers[first] = nn.Linear(48, width)
    if more:
        layers["more"] = nn.Linear(width, width)
    layers["out"] = nn.Linear(width, 5)
    return nn.Sequential(layers)


# Disagreement -----------------------------------------------------------------------------------


MODELS = {
    "a layer's width": (lambda: layered(width=40), ["'hidden.weight'", "32, 48", "40, 48"]),
    "a layer's name": (lambda: layered("other"), ["'hidden.weight'", "'other.weight'"]),
    "the number of layers": (lambda: layered(more=True), ["number of layers", "6", "4"]),
    "a layer's type": (lambda: layered().double(), ["'hidden.weight'", "64"]),
}


@pytest.mark.parametrize("named", [True, False], ids=["named", "bare"])
@pytest.mark.parametrize(("other", "words"), MODELS.values(), ids=MODELS)
def test_another_model_on_one_rank_is_refused_on_all(other, words, named):
    model = other() if odd() else layered()
    given = model.named_parameters() if named else None
    compression = DLSCompressor(given, density=0.05, **SPARSE)
    optimizer = wrap(model, compression)
    with pytest.raises(DLSError) as error:
        train(model, optimizer, [0])
    assert_told(error, words)


OPTIONS = {
    "density": ({"density": 0.05}, {"density": 0.06}, ["density", "0.05", "0.06"]),
    "strategy": ({}, {"strategy": "layerwise"}, ["strategy", "'dls'", "'layerwise'"]),
    "nonfinite": ({}, {"nonfinite": "skip"}, ["nonfinite", "'raise'", "'skip'"]),
    "clip_norm": ({}, {"clip_norm": 2.0}, ["clip_norm", "None", "2.0"]),
    "values": ({}, {"values": "bfloat16"}, ["values", "'float32'", "'bfloat16'"]),
    "layer_density": ({}, {"layer_density": {"hidden.*": 0.5}}, ["layer_density", "0.5"]),
}


@pytest.mark.parametrize(("usual", "other", "words"), OPTIONS.values(), ids=OPTIONS)
def test_another_option_on_one_rank_is_refused_on_all(usual, other, words):
    model = layered()
    compression = DLSCompressor(**{"density": 0.05, **SPARSE, **(other if odd() else usual)})
    with pytest.raises(DLSError) as error:
        train(model, wrap(model, compression), [0])
    assert_told(error, words)


@pytest.mark.parametrize(
    ("module", "attribute", "value", "words"),
    [
        (hvd_dls, "__version__", "0.0.1", ["version", "0.0.1", hvd_dls.__version__]),
        (agreement, "VERSION", 2, ["wire", "2", str(agreement.VERSION)]),
        (binding, "_sources", lambda: "patched", ["sources of hvd_dls", "patched"]),
    ],
    ids=["package", "wire", "sources"],
)
def test_another_version_on_one_rank_is_refused_on_all(
    module, attribute, value, words, monkeypatch
):
    if odd():
        monkeypatch.setattr(module, attribute, value)
    model = layered()
    compression = DLSCompressor(density=0.05, **SPARSE)
    with pytest.raises(DLSError) as error:
        train(model, wrap(model, compression), [0])
    assert_told(error, words)


def assert_told(error, words):
    """Which rank differs, and in what."""
    text = str(error.value)
    assert re.search(rf"rank(\(s\))? \[?{hvd.size() - 1}\b", text), text
    assert [word for word in words if word not in text] == [], text


def test_options_that_are_a_rank_s_own_affair_may_differ():
    model = net_without_vectors()
    own = {"threads": 1 + hvd.rank(), "measure_every": hvd.rank()}
    compression = DLSCompressor(model.named_parameters(), density=0.05, **SPARSE, **own)
    train(model, wrap(model, compression), range(3))
    assert compression.last_step().step == 3
    assert_same_on_all_ranks(flat(model))


# What a process has done before -----------------------------------------------------------------


def test_a_compressor_that_one_rank_made_and_never_used():
    if odd():
        probe = net_without_vectors()
        DLSCompressor(probe.named_parameters(), density=0.05, **SPARSE)
        torch.manual_seed(1)
    model = net_without_vectors()
    compression = DLSCompressor(model.named_parameters(), density=0.05, **SPARSE)
    train(model, wrap(model, compression), range(3))
    assert compression.last_step().step == 3
    assert_same_on_all_ranks(flat(model))


def test_models_that_are_made_in_another_order_on_one_rank():
    trained = {}
    for seed in (2, 1) if odd() else (1, 2):
        torch.manual_seed(seed)
        model = net_without_vectors()
        compression = DLSCompressor(model.named_parameters(), density=0.05, **SPARSE)
        trained[seed] = model, wrap(model, compression)
    for step in range(3):
        for seed in (1, 2):
            train(*trained[seed], [step])
    for seed in (1, 2):
        assert_same_on_all_ranks(flat(trained[seed][0]))
    assert not torch.equal(flat(trained[1][0]), flat(trained[2][0]))


def test_a_model_that_one_rank_has_trained_alone():
    """In a process set of its own, which the other ranks are outside of."""
    alone = hvd.add_process_set([hvd.size() - 1])
    before = net_without_vectors()
    compression = DLSCompressor(before.named_parameters(), density=0.05, **SPARSE)
    optimizer = wrap(before, compression, process_set=alone)
    if odd():
        train(before, optimizer, range(3))
        assert compression.last_step().step == 3
    torch.manual_seed(1)
    model = net_without_vectors()
    compression = DLSCompressor(model.named_parameters(), density=0.05, **SPARSE)
    train(model, wrap(model, compression), range(3))
    assert compression.last_step().step == 3
    assert_same_on_all_ranks(flat(model))
    hvd.remove_process_set(alone)


# Process sets -----------------------------------------------------------------------------------


@pytest.fixture
def halves():
    """The process set of this rank, one of two."""
    middle = hvd.size() // 2
    both = [hvd.add_process_set(range(middle)), hvd.add_process_set(range(middle, hvd.size()))]
    yield both[hvd.rank() >= middle]
    for process_set in both:
        hvd.remove_process_set(process_set)


@pytest.mark.parametrize("named", [True, False], ids=["named", "bare"])
def test_the_process_set_is_the_optimizer_s(halves, named):
    trained = []
    for explicit in (True, False):
        torch.manual_seed(1)
        model = net_without_vectors()
        given = model.named_parameters() if named or explicit else None
        options = {"process_set": halves} if explicit else {}
        compression = DLSCompressor(given, density=0.05, **SPARSE, **options)
        train(model, wrap(model, compression, process_set=halves), range(4))
        assert compression.last_step().step == 4
        trained.append(flat(model))
    everyone = hvd.allgather(trained[1][None], name="halves")
    assert torch.equal(everyone[0], everyone[hvd.size() // 2 - 1])
    assert not torch.equal(everyone[0], everyone[-1])  # the two trainings are two
    assert torch.equal(*trained)


def test_a_process_set_that_is_not_the_optimizer_s_is_refused(halves):
    model = net_without_vectors()
    compression = DLSCompressor(
        model.named_parameters(), process_set=hvd.global_process_set, density=0.05, **SPARSE
    )
    with pytest.raises(DLSError, match="process_set"):
        train(model, wrap(model, compression, process_set=halves), [0])
