"""Jobs that a script or notebook starts by itself, with ``horovod.run``."""

import os
import subprocess
import sys

import pytest

from tests.jobs import JOB, ROOT

pytest.importorskip("torch")
pytest.importorskip("horovod.torch")

SCRIPT = """
import horovod
from hvd_dls.torch import DLSCompressor

def train(*choices):
    import torch
    import horovod.torch as hvd
    hvd.init()
    held = []
    for compression in choices:
        torch.manual_seed(hvd.rank())
        model = torch.nn.Linear(64, 512)
        optimizer = hvd.DistributedOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1),
            named_parameters=model.named_parameters(), compression=compression)
        hvd.broadcast_parameters(model.state_dict(), root_rank=0)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(8, 64)).square().mean().backward()
            optimizer.step()
        held.append(model.weight.detach().numpy().tobytes())
    return held

if __name__ == "__main__":
    choices = DLSCompressor, DLSCompressor(density=0.05, exchange="sparse_allreduce")
    first, second = horovod.run(train, args=choices, np=2, use_gloo=True)
    assert len(first) == 2 and first == second, "ranks differ"
    assert first[0] != first[1]
"""


def test_the_class_and_its_instances_travel_to_the_ranks(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=JOB,
    )
    assert done.returncode == 0, done.stdout
