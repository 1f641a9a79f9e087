"""All of with_ranks/ and with_hosts/, as real horovodrun jobs, for Keras 3 and tf_keras.

Keras 3 in one process and on four ranks is in TensorFlow's jobs.
"""

import re
import subprocess
import sys

import pytest

from tests.jobs import ROOT, controller, horovodrun, needs, pytest_on_ranks

pytestmark = needs("tensorflow")

HERE = "tests/keras/with_ranks"


def test_keras_3_on_two_ranks():
    """In one job, since importing TensorFlow takes longer than many a file's tests."""
    files = sorted((ROOT / HERE).glob("test_*.py"))
    # Last, those that start Horovod anew.
    files.sort(key=lambda file: file.name in ("test_elastic.py", "test_lifecycle.py"))
    output = pytest_on_ranks(2, *map(str, files))
    assert output.count(" passed") == 2, output


@pytest.mark.parametrize("options", [[], ["--dls"]])
def test_horovods_own_example(options, tmp_path):
    output = horovodrun(2, ["tests/keras/like_horovods_example.py", str(tmp_path), *options])
    accuracies = [float(found) for found in re.findall(r"accuracy (0\.\d+)\n", output)]
    assert len(accuracies) == 2
    assert min(accuracies) > 0.6


def test_tf_keras_on_two_ranks():
    output = pytest_on_ranks(2, f"{HERE}/test_tf_keras.py", env={"TF_USE_LEGACY_KERAS": "1"})
    assert output.count(" passed") == 2, output


def test_tf_keras_on_four_ranks_of_two_hosts():
    """With and without averages of each host; over MPI, which sees that it is one, without."""
    names = ["fit[class]", "nothing_is_lost", "density_one_is_dense", "custom_loop_with_tape"]
    paths = [f"{HERE}/test_tf_keras.py::test_{name}" for name in names]
    env = {"TF_USE_LEGACY_KERAS": "1"}
    if controller() == "mpi":
        output = pytest_on_ranks(4, *paths, env=env)
    else:
        paths.append("tests/keras/with_hosts")
        output = pytest_on_ranks(4, *paths, env=env, per_host=(2, 2))
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
