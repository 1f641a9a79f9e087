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
    "strategy": ["dls", "layerwise"],
    "prior": ["paper", "weight_norm", "uniform"],
    "tail": ["gaussian", "laplace", "weibull", "pareto"],
    "pair_steps": [None, 1, 4, np.int64(4)],
    "adjust_every": [1, 100, np.int32(2)],
    "min_k": [1, 10],
    "dense_below": [0, 1, 1 << 20],
    "cost_rule": [True, False],
    "values": ["float32", "float16", "bfloat16"],
    "index_code": ["elias-fano", "plain"],
    "bucket_bytes": [1, 1 << 30],
    "measure_every": [0, 1, 50],
}
BAD = {
    "density": [0, -0.1, 1.0001, 2, float("nan"), float("inf"), "0.1", None, True, 1j],
    "strategy": ["DLS", "", None, 3],
    "prior": ["eq8", None, 3],
    "tail": ["normal", None],
    "pair_steps": [0, -1, 1.5, "4", True],
    "adjust_every": [0, -1, 2.0, None, True],
    "min_k": [0, -5, 1.0, None, False],
    "dense_below": [-1, 0.5, None, True],
    "cost_rule": [0, 1, "yes", None],
    "values": ["float64", "half", None],
    "index_code": ["rice", None],
    "bucket_bytes": [0, -1, 1.5, None, True],
    "measure_every": [-1, 1.0, None, True],
}
OPTIONS = [field.name for field in dataclasses.fields(DLSConfig)]


def each(values):
    return [(option, value) for option, several in values.items() for value in several]


def test_the_tables_here_know_every_option():
    assert list(GOOD) == list(BAD) == OPTIONS


@pytest.mark.parametrize(("option", "value"), each(GOOD), ids=str)
def test_what_is_accepted_is_kept(option, value):
    assert getattr(DLSConfig(**{option: value}), option) == value
    assert DLSConfig.from_options(**{option: value}) == DLSConfig(**{option: value})


@pytest.mark.parametrize(("option", "value"), each(BAD), ids=str)
def test_what_is_not_is_refused_by_option_and_value(option, value):
    with pytest.raises(DLSError) as error:
        DLSConfig(**{option: value})
    assert str(error.value).startswith(f"{option}={value!r}: accepted ")
    assert isinstance(error.value, ValueError)


@pytest.mark.parametrize("option", ["strategy", "prior", "tail", "values", "index_code"])
def test_a_refused_choice_lists_the_choices(option):
    with pytest.raises(DLSError) as error:
        DLSConfig(**{option: "?"})
    assert all(repr(choice) in str(error.value) for choice in GOOD[option])


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


@pytest.mark.parametrize("module", ["hvd_dls", "hvd_dls.core.session"])
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
