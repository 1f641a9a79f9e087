"""The standard library as text: whole files are held out."""

from __future__ import annotations

from tests.jobs import needs

pytestmark = [needs("torch"), needs("sklearn")]


def test_some_files_are_held_out_and_the_text_is_large_enough():
    from benchmarks.convergence.library import texts

    training, held_out = texts()
    assert len(training) > 5e6
    assert 0.02 < len(held_out) / len(training) < 0.2
    assert held_out[:2000] not in training
    assert texts() == (training, held_out)
