"""All of with_ranks/ and with_one_rank/, as real horovodrun jobs, for Keras 3 and tf_keras."""

import re
import subprocess
import sys

import pytest

from tests.jobs import horovodrun, needs, pytest_on_ranks

pytestmark = needs("tensorflow")

HERE = "tests/keras/with_ranks"


@pytest.mark.parametrize(
    "file",
    ["test_keras3", "test_accumulation", "test_lifecycle", "test_like_horovod", "test_names",
     "test_nonfinite_embeddings"],
)  # fmt: skip
def test_keras_3_on_two_ranks(file):
    output = pytest_on_ranks(2, f"{HERE}/{file}.py")
    assert output.count(" passed") == 2, output


def test_keras_3_in_one_process():
    output = pytest_on_ranks(1, "tests/keras/with_one_rank")
    assert output.count(" passed") == 1, output


@pytest.mark.parametrize("options", [[], ["--dls"]])
def test_horovods_own_example(options, tmp_path):
    output = horovodrun(2, ["tests/keras/like_horovods_example.py", str(tmp_path), *options])
    accuracies = [float(found) for found in re.findall(r"accuracy (0\.\d+)\n", output)]
    assert len(accuracies) == 2
    assert min(accuracies) > 0.6


def test_keras_3_on_four_ranks():
    chosen = (
        "dls and (fit_with_a_smaller or custom_loop or process_sets) or options0 or nothing_is_lost"
    )
    output = pytest_on_ranks(4, f"{HERE}/test_keras3.py", "-k", chosen)
    assert output.count(" passed") == 4, output


def test_tf_keras_on_two_ranks():
    output = pytest_on_ranks(2, f"{HERE}/test_tf_keras.py", env={"TF_USE_LEGACY_KERAS": "1"})
    assert output.count(" passed") == 2, output


def test_tf_keras_on_four_ranks():
    names = ["fit[class]", "nothing_is_lost", "density_one_is_dense", "custom_loop_with_tape"]
    output = pytest_on_ranks(
        4,
        *(f"{HERE}/test_tf_keras.py::test_{name}" for name in names),
        env={"TF_USE_LEGACY_KERAS": "1"},
    )
    assert output.count(" passed") == 4, output


@pytest.mark.parametrize("version", ["2.15.0", "3.9.2"])
def test_an_older_keras_is_refused(version):
    program = (
        "import sys, types; keras = sys.modules['keras'] = types.ModuleType('keras'); "
        f"keras.__version__ = {version!r}; import hvd_dls.keras"
    )
    job = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert f"needs Keras 3.10 or newer, this is {version}" in job.stderr


@needs("torch")
def test_another_backend_is_refused():
    program = "import os; os.environ['KERAS_BACKEND'] = 'torch'; import hvd_dls.keras"
    job = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "DLSError" in job.stderr
    assert "TensorFlow backend" in job.stderr
