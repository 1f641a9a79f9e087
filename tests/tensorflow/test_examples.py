"""The examples for TensorFlow, on real data and two ranks."""

import json
import re

import pytest

from tests.jobs import horovodrun


def accuracy(output):
    return float(re.search(r"test accuracy (\S+)", output)[1])


def test_tensorflow2_digits(tmp_path):
    records = tmp_path / "records.jsonl"
    output = horovodrun(
        2,
        ["examples/tensorflow2_digits.py", "--compression", "dls", "--density", "0.02",
         "--epochs", "8", "--lr", "0.05", "--records", str(records), "--no-cuda"],
    )  # fmt: skip
    assert accuracy(output) > 0.85
    steps = [json.loads(line) for line in records.read_text().splitlines()]
    assert [s["step"] for s in steps] == list(range(1, 89))
    assert steps[-1]["loss"] < 0.7 * steps[0]["loss"]
    assert steps[-1]["spread"] < steps[0]["spread"]
    assert steps[-1]["energy"] > 0.9


@pytest.mark.parametrize("example", ["keras3_digits.py", "tf_keras_digits.py"])
def test_keras_digits(example):
    output = horovodrun(
        2,
        [f"examples/{example}", "--density", "0.05", "--epochs", "8", "--lr", "0.1", "--no-cuda"],
        env={"TF_USE_LEGACY_KERAS": "1"} if example.startswith("tf_keras") else None,
    )
    assert accuracy(output) > 0.85


def test_tensorflow2_synthetic_benchmark():
    output = horovodrun(
        2,
        ["examples/tensorflow2_synthetic_benchmark.py", "--model", "MobileNet", "--no-cuda",
         "--image-size", "32", "--batch-size", "2", "--num-warmup-batches", "1",
         "--num-batches-per-iter", "1", "--num-iters", "2"],
    )  # fmt: skip
    assert re.search(r"Iter #1: [\d.]+ img/sec per CPU", output)
    assert re.search(r"Total img/sec on 2 CPU\(s\): [\d.]+ \+-[\d.]+", output)
