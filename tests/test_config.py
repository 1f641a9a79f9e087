"""Options: each validated, each refusal names the option, its value and what is accepted."""

import dataclasses
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest

import hvd_dls
from hvd_dls import DLSConfig, DLSError

GOOD = {
    "density": [1e-9, 0.5, 1, 1.0, Fraction(1, 3), np.float32(0.25)],
    "strategy": ["dls", "layerwise", "global", "norm", "hard"],
    "momentum": [0, 0.0, 0.9, 0.999, np.float32(0.5), Fraction(1, 2)],
    "adam": [None, (0.5, 0.999), (0, 0.0), (np.float32(0.5), Fraction(1, 2))],
    "dense_steps": [0, 1, 1000, np.int64(4)],
    "warmup_steps": [0, 1, 1000, np.int64(4)],
    "nonfinite": ["raise", "skip"],
    "hierarchical": [True, False],
    "exchange": ["allgather", "sparse_allreduce", "auto"],
    "layer_density": [(), (("*", 1),), (("a.*", 0.1), ("[bc]?", "dense")), (("a", 1e-9),) * 2],
    "warmup_density": [1e-9, 0.5, 1, 1.0, Fraction(1, 3)],
    "nesterov": [True, False],
    "momentum_masking": [True, False],
    "adam_eps": [1e-12, 1e-8, np.float32(1e-6), 1],
    "clip_norm": [None, 1e-9, 1, 10.0, np.float32(5)],
    "clip_value": [None, 1e-9, 1, 10.0, np.float32(5)],
    "clip_global_norm": [None, 1e-9, 1, 10.0, np.float32(5)],
    "threshold": [1e-9, 1, 10.0, np.float32(5)],
    "prior": ["paper", "weight_norm", "uniform", "measured"],
    "tail": ["gaussian", "laplace", "weibull", "pareto"],
    "pair_steps": [None, 1, 4, np.int64(4)],
    "adjust_every": [1, 100, np.int32(2)],
    "min_k": [1, 10],
    "dense_below": [0, 1, 1 << 20],
    "cost_rule": [True, False],
    "values": ["float32", "float16", "bfloat16"],
    "index_code": ["elias-fano", "plain"],
    "bucket_bytes": [None, 1, 1 << 30],
    "threads": [None, 1, 64],
    "measure_every": [0, 1, 50],
}
BAD = {
    "density": [0, -0.1, 1.0001, 2, float("nan"), float("inf"), "0.1", None, True, 1j],
    "strategy": ["DLS", "", None, 3],
    "momentum": [-0.1, 1, 1.5, float("nan"), "0.9", None, True],
    "adam": [
        0.9,
        (0.9,),
        (0.9, 0.999, 0.9),
        (0.9, 1),
        (-0.1, 0.9),
        ("a", "b"),
        True,
        {0.5: 1, 0.9: 2},
    ],
    "dense_steps": [-1, 1.0, "1", None, True],
    "warmup_steps": [-1, 1.0, "1", None, False],
    "nonfinite": ["ignore", "", None, True],
    "hierarchical": [0, 1, "yes", None],
    "exchange": ["allreduce", "Auto", "", None, True],
    "layer_density": [
        None,
        3,
        "abc",
        {"a": 0},
        {"a": 1.01},
        {"a": -0.1},
        {"a": float("nan")},
        {"a": "Dense"},
        {"a": None},
        {"a": True},
        {3: 0.5},
        [("a", 0.5, 0.5)],
        [("a",)],
        [0.5],
    ],
    "warmup_density": [0, -0.1, 1.0001, float("nan"), float("inf"), "0.1", None, True],
    "nesterov": [0, 1, "yes", None],
    "momentum_masking": [0, 1, "yes", None],
    "adam_eps": [0, 1e-50, -1e-8, float("inf"), "1e-8", None],
    "clip_norm": [0, -1.0, float("nan"), float("inf"), "1", True],
    "clip_value": [0, -1.0, float("nan"), float("inf"), "1", False],
    "clip_global_norm": [0, -1.0, float("nan"), float("inf"), "1", False],
    "threshold": [0, -1.0, float("nan"), float("inf"), "1", True],
    "prior": ["eq8", None, 3],
    "tail": ["normal", None],
    "pair_steps": [0, -1, 1.5, "4", True],
    "adjust_every": [0, -1, 2.0, None, True],
    "min_k": [0, -5, 1.0, None, False],
    "dense_below": [-1, 0.5, None, True],
    "cost_rule": [0, 1, "yes", None],
    "values": ["float64", "half", None],
    "index_code": ["rice", None],
    "bucket_bytes": [0, -1, 1.5, True],
    "threads": [0, -1, 1.5, True],
    "measure_every": [-1, 1.0, None, True],
}
OPTIONS = [field.name for field in dataclasses.fields(DLSConfig)]
CHOICES = ["strategy", "nonfinite", "exchange", "prior", "tail", "values", "index_code"]


def each(values):
    return [(option, value) for option, several in values.items() for value in several]


def with_others(option, value):
    """The option, and what it cannot do without."""
    others = {}
    if option == "threshold":
        others["strategy"] = "hard"
    if option == "strategy" and value == "hard":
        others["threshold"] = 1.0
    if option == "nesterov":
        others["momentum"] = 0.9
    return {option: value} | others


def test_the_tables_here_know_every_option():
    assert list(GOOD) == list(BAD) == OPTIONS


@pytest.mark.parametrize(("option", "value"), each(GOOD), ids=str)
def test_what_is_accepted_is_kept(option, value):
    options = with_others(option, value)
    kept = getattr(DLSConfig(**options), option)
    assert kept == (float(value) if isinstance(value, Fraction) else value)
    assert DLSConfig.from_options(**options) == DLSConfig(**options)


@pytest.mark.parametrize(("option", "value"), each(BAD), ids=str)
def test_what_is_not_is_refused_by_option_and_value(option, value):
    with pytest.raises(DLSError) as error:
        DLSConfig(**with_others(option, value))
    assert str(error.value).startswith(f"{option}={value!r}: accepted ")
    assert isinstance(error.value, ValueError)


@pytest.mark.parametrize("option", CHOICES)
def test_a_refused_choice_lists_the_choices(option):
    with pytest.raises(DLSError) as error:
        DLSConfig(**{option: "?"})
    assert all(repr(choice) in str(error.value) for choice in GOOD[option])


@pytest.mark.parametrize("given", [dict, list, tuple, iter], ids=lambda kind: kind.__name__)
def test_layer_densities_are_kept_as_pairs_in_their_order(given):
    pairs = (("b*", 0.5), ("a", "dense"), ("*", 1))
    config = DLSConfig(layer_density=given(dict(pairs) if given is dict else pairs))
    assert config.layer_density == pairs
    assert config == DLSConfig(layer_density=[["b*", 0.5], ["a", "dense"], ["*", 1]])
    assert hash(config) == hash(DLSConfig(layer_density=pairs))
    assert repr(config) == repr(DLSConfig(layer_density=pairs))


@pytest.mark.parametrize("strategy", GOOD["strategy"])
def test_a_threshold_belongs_to_hard_and_hard_needs_one(strategy):
    with pytest.raises(DLSError, match=f"strategy='{strategy}' with threshold=.*'hard' needs a"):
        DLSConfig(strategy=strategy, threshold=None if strategy == "hard" else 1.0)


@pytest.mark.parametrize("others", [{"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}])
def test_adam_has_a_momentum_of_its_own(others):
    with pytest.raises(DLSError, match=r"adam=\(0.5, 0.999\) with momentum=0.9.*first beta"):
        DLSConfig(adam=(0.5, 0.999), **others)


def test_nesterov_needs_a_momentum():
    with pytest.raises(DLSError, match="nesterov=True needs a momentum"):
        DLSConfig(nesterov=True)


def test_an_unknown_option_is_refused_and_the_known_ones_listed():
    with pytest.raises(DLSError, match="unknown option 'densty': accepted are ") as error:
        DLSConfig.from_options(densty=0.1)
    assert all(option in str(error.value) for option in OPTIONS)


def test_a_configuration_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        DLSConfig().density = 0.5
    with pytest.raises(DLSError):
        dataclasses.replace(DLSConfig(), density=2)
    assert hash(DLSConfig()) == hash(DLSConfig())


@pytest.mark.parametrize("module", ["hvd_dls", "hvd_dls.core.session.session"])
def test_the_package_imports_no_framework(module):
    code = f"import {module}, sys; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "hvd_dls" in found.stdout.split()
    unwanted = {"torch", "tensorflow", "horovod", "keras"}
    if module == "hvd_dls":
        unwanted.add("numba")
    assert not unwanted & set(found.stdout.split())


def test_the_public_names_exist():
    assert all(hasattr(hvd_dls, name) for name in hvd_dls.__all__)


@pytest.mark.parametrize(
    ("others", "words"),
    [
        ({"strategy": "global"}, "strategy='global'"),
        ({"strategy": "norm"}, "strategy='norm'"),
        ({"strategy": "hard", "threshold": 1.0}, "strategy='hard'"),
        ({"momentum": 0.9, "dense_steps": 5}, "dense_steps=5"),
        ({"momentum": 0.9, "prior": "measured"}, "prior='measured'"),
        ({"adam": (0.5, 0.9), "dense_steps": 5}, "dense_steps=5"),
        ({"adam": (0.5, 0.9), "prior": "measured"}, "prior='measured'"),
    ],
)
def test_hierarchical_refuses_what_it_cannot_do(others, words):
    with pytest.raises(DLSError, match=f"hierarchical=True.*{words}"):
        DLSConfig(hierarchical=True, **others)
