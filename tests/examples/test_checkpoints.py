"""The torch example with checkpoints: a second job goes on where the first one ended."""

import re

from tests.jobs import horovodrun


def epochs_of(output):
    return sorted(set(map(int, re.findall(r"epoch (\d+)", output))))


def test_the_second_job_goes_on_where_the_first_one_ended(tmp_path):
    command = ["examples/torch_digits.py", "--checkpoints", str(tmp_path), "--log-interval", "1"]
    assert epochs_of(horovodrun(2, [*command, "--epochs", "1"])) == [1]
    assert epochs_of(horovodrun(2, [*command, "--epochs", "3"])) == [2, 3]
