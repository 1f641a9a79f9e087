"""The examples for TensorFlow, on real data and two ranks."""

import json
import re

import pytest

from tests.jobs import horovodrun


def accuracy(output):
    return float(re.search(r"test accuracy (\S+)", output)[1])


@pytest.mark.parametrize("compression", ["none", "dls"])
def test_tensorflow2_digits(compression, tmp_path):
    records = tmp_path / "records.jsonl"
    output = horovodrun(
        2,
        ["examples/tensorflow2_digits.py", "--compression", compression, "--density", "0.02",
         "--epochs", "8", "--lr", "0.05", "--records", str(records), "--no-cuda"],
        time_limit=280,
    )  # fmt: skip
    assert accuracy(output) > 0.85
    steps = [json.loads(line) for line in records.read_text().splitlines()]
    assert [s["step"] for s in steps] == list(range(1, 89))
    assert steps[-1]["loss"] < 0.7 * steps[0]["loss"]
    if compression == "dls":
        assert steps[-1]["spread"] < steps[0]["spread"]
        assert steps[-1]["energy"] > 0.9


@pytest.mark.parametrize("example", ["keras3_digits.py", "tf_keras_digits.py"])
def test_keras_digits(example):
    output = horovodrun(
        2,
        [f"examples/{example}", "--density", "0.05", "--epochs", "8", "--lr", "0.1", "--no-cuda"],
        time_limit=280,
        env={"TF_USE_LEGACY_KERAS": "1"} if example.startswith("tf_keras") else None,
    )
    assert accuracy(output) > 0.85
