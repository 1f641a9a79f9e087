"""Shapes of a gradient's distribution."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_dls.core.balancing.tails import TAILS, pareto, weibull

SHAPES = TAILS | {"weibull 2": weibull(2.0), "weibull 0.4": weibull(0.4), "pareto 0.4": pareto(0.4)}


@pytest.fixture(params=SHAPES)
def shape(request):
    return SHAPES[request.param]


@given(st.floats(-12, 0).map(lambda exponent: 10.0**exponent))
@pytest.mark.parametrize("name", SHAPES)
def test_survival_of_its_inverse_is_the_identity(name, ratio):
    shape = SHAPES[name]
    assert shape.survival(shape.inverse(ratio)) == pytest.approx(ratio, rel=1e-9)


def test_survival_starts_at_one_and_falls_to_zero(shape):
    assert shape.survival(0.0) == 1
    assert shape.inverse(1.0) == 0
    assert shape.survival(1e9) < 1e-12
    falling = [shape.survival(x) for x in np.linspace(0, 5, 200)]
    assert np.all(np.diff(falling) < 0)


def test_variance_is_one(shape):
    # E[X^2] = integral of 2 x S(x), here over ln x.
    log_x = np.linspace(-20, 60, 80_001)
    x = np.exp(log_x)
    integrand = 2 * x**2 * np.array([shape.survival(value) for value in x])
    trapezoids = (integrand[1:] + integrand[:-1]) / 2 * np.diff(log_x)
    assert trapezoids.sum() == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize(("heavy", "light"), [("pareto", "laplace"), ("laplace", "gaussian")])
def test_heavier_tails_hold_more_far_out(heavy, light):
    assert TAILS[heavy].survival(6.0) > TAILS[light].survival(6.0)


def test_weibull_with_beta_one_is_laplace():
    assert TAILS["laplace"].survival(1.3) == pytest.approx(np.exp(-np.sqrt(2) * 1.3))
