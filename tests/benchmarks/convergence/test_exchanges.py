"""Exchanges at equal bytes, in the simulation."""

from __future__ import annotations

import numpy as np
import pytest

from tests.jobs import needs

pytestmark = needs("torch", "horovod")


@pytest.mark.parametrize("scheme", ["gathered", "returned", "kept", "oracle"])
def test_what_is_not_handed_out_comes_later(scheme):
    """Without momentum, with whole numbers: sums in total are gradients in total, in the end."""
    from benchmarks.convergence.schemes import Scheme

    generator, workers, n = np.random.default_rng(0), 4, 60
    of = Scheme(scheme, workers, n, 0.0, True)
    came, out = np.zeros(n), np.zeros(n)
    for _ in range(5):
        gradients = generator.integers(-9, 10, (workers, n)).astype(np.float32)
        came += gradients.sum(axis=0)
        out += of.exchange(gradients.copy(), 6).total
    assert np.any(came != out)
    for _ in range(200):
        out += of.exchange(np.zeros((workers, n), np.float32), n).total
    np.testing.assert_array_equal(out, came)


def test_the_table_has_equal_bytes(tmp_path, capsys):
    from benchmarks.convergence import exchanges

    arguments = ["--tasks", "digits", "--layouts", "4x2", "--steps", "3", "--folder", str(tmp_path)]
    for _ in range(2):  # the second time from what was kept
        assert exchanges.main([*arguments, "--schemes", "dense", "gathered", "kept"]) == 0
        printed = capsys.readouterr().out
    rows = [line.split(" | ") for line in printed.splitlines() if "4x2" in line]
    assert len(rows) == 3
    assert [float(row[4]) for row in rows[1:]] == pytest.approx([0.1, 0.1], rel=0.05)
