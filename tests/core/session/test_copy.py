"""A copy of a session: what elastic training goes back to."""

import numpy as np
import pytest

from hvd_dls import DLSConfig, DLSError
from hvd_dls.core.session.session import Session
from tests.core.options import each_option
from tests.core.ranks import LAYERS, frozen, run, same
from tests.core.session.test_inherit import heirs, trained


@each_option
def test_a_copy_goes_on_to_the_bit_and_is_its_own(options):
    sessions = trained(**options)
    before = list(map(frozen, sessions))
    others = [session.copy() for session in sessions]
    assert list(map(frozen, others)) == before
    rngs = np.random.default_rng(1), np.random.default_rng(1)
    assert same(run(others, rngs[0], 3), run(sessions, rngs[1], 3))
    assert list(map(frozen, others)) == list(map(frozen, sessions)) != before


def test_a_copy_holds_what_waits_in_layers_that_are_dense_now():
    others = heirs(trained(cost_rule=True), 4, 2.0, cost_rule=True)
    for session in others:
        copy = session.copy()
        assert same(copy.memory.leftovers, session.memory.leftovers)
        assert frozen(copy) == frozen(session)
    assert others[0].memory.leftovers


def test_a_step_in_progress_is_not_in_a_copy():
    session = trained()[0]
    before = frozen(session)
    session.compress("fc.weight", np.ones(1200, np.float32))
    copy = session.copy()
    assert not copy.in_step
    assert frozen(copy) == before
    session.abandon()


def test_what_is_half_written_is_not_copied():
    session = trained()[0]
    session._writing = "residuals"
    with pytest.raises(DLSError, match="residuals were being written"):
        session.copy()


def test_the_copy_of_a_session_whose_ratios_began_with_norms_of_weights():
    norms = {layer.name: float(number + 1) for number, layer in enumerate(LAYERS)}
    session = Session(LAYERS, DLSConfig(prior="weight_norm", cost_rule=False), 2, 0, norms)
    assert frozen(session.copy()) == frozen(session)
