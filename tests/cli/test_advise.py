"""``hvd-dls advise``, as a job of two ranks."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

from hvd_dls.advice.advice import UNKNOWN
from tests.jobs import ROOT, horovodrun, needs

MODEL = """
import os
import torch

def small():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.ReLU(), torch.nn.Linear(96, 32))
    step = lambda model: model(torch.randn(8, 64)).square().mean()
    return model, step, lambda parameters: torch.optim.Adam(parameters)

def missing_on_rank_1():
    if os.environ["HOROVOD_RANK"] == "1":
        raise FileNotFoundError("no data here")
    return small()
"""
QUICK = ["--seconds", "1", "--turns", "2"]


@needs("torch", "horovod")
def test_two_ranks_are_advised(tmp_path):
    (tmp_path / "my_training.py").write_text(MODEL)
    path = {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    command = ["-m", "hvd_dls", "advise", "--model", "my_training:small", *QUICK]
    file = tmp_path / "out" / "advice.json"
    # 0.0001 is too low for two layers of 9,000 entries: that is said, and the others are tried.
    densities = ["--densities", "0.05", "0.0001"]
    exchanges = ["--exchanges", "allgather", "sparse_allreduce"]
    said = horovodrun(2, [*command, *densities, *exchanges, "--json", str(file)], env=path)
    assert said.count("hvd-dls advise: 2 ranks on 1 host(s), 9,344 gradients in 4 tensors") == 1
    assert said.count(UNKNOWN) == 1
    assert "turn 2 of 2" in said
    assert re.search(r"not tried: DLS 0\.01 %: .*density=0\.0001", said), said
    written = json.loads(file.read_text())
    tried = ["dense", "fp16", "dls:0.05", "dls:0.05:sparse_allreduce"]
    assert [row["name"] for row in written["rows"]] == tried
    for row in written["rows"]:
        assert len(row["turns"]) == 2
        assert min(row["turns"]) > 0
    dense, fp16, dls, owners = (row["link_bytes"] for row in written["rows"])
    assert dense == 2 * fp16 == 4 * 9344
    assert dls < fp16
    assert owners < fp16
    for row in written["rows"][2:]:
        assert set(row["parts"]) >= {"find", "pack", "wait", "settle"}
    assert len(written["votes"]) == 2
    recommended = written["recommended"]["name"]
    assert recommended in tried
    assert ("Leave it dense" in said) == (recommended == "dense")


@needs("torch", "horovod")
def test_a_rank_that_cannot_make_its_model_is_named_by_all(tmp_path):
    (tmp_path / "my_training.py").write_text(MODEL)
    path = {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    command = ["-m", "hvd_dls", "advise", "--model", "my_training:missing_on_rank_1", *QUICK]
    shell = (
        "import subprocess, sys; "
        "status = subprocess.run([sys.executable, *sys.argv[1:]]).returncode; "
        "print('ended with', status, flush=True)"
    )
    said = horovodrun(2, ["-c", shell, *command], env=path)
    assert said.count("hvd-dls advise: rank 1: FileNotFoundError: no data here") == 1, said
    assert said.count("ended with 2") == 2


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "--model"),
        (["--shapes", "3x"], "3x"),
        (["--shapes", "3", "--model", "a:b"], "not allowed with"),
        (["--shapes", "3", "--compute-ms", "-1"], "--compute-ms"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments, named):
    done = subprocess.run(
        [sys.executable, "-m", "hvd_dls", "advise", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert named in done.stderr
