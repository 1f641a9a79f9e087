"""Checkpoints across jobs: killed and resumed, and on other numbers of ranks."""

import pytest

from tests.jobs import horovodrun, needs

pytestmark = needs("torch")

PROGRAM = ["-m", "tests.torch.checkpoint_program"]


def test_a_job_that_is_killed_again_and_again_comes_to_the_same_bits(tmp_path):
    """In mid-step, and on either rank while a checkpoint is written."""
    after = 0
    for kill in ("step", "manifest", "part"):
        with pytest.raises(pytest.fail.Exception) as killed:
            horovodrun(2, [*PROGRAM, "survive", str(tmp_path), kill])
        assert f"rank 1 goes on after step {after}" in str(killed.value)
        after += 4
    output = horovodrun(2, [*PROGRAM, "survive", str(tmp_path)])
    assert f"rank 1 goes on after step {after}" in output
    assert output.count("came to the same") == 2, output


def test_other_numbers_of_ranks_lose_nothing(tmp_path):
    for number, ranks in enumerate((2, 3, 2, 1, 2)):
        output = horovodrun(ranks, [*PROGRAM, "move", str(tmp_path)])
        assert output.count(f"of {ranks} lost nothing after {3 * number} steps") == ranks, output
