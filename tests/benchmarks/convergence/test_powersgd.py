"""PowerSGD in the simulation, beside torch's own hook."""

from __future__ import annotations

import socket

import numpy as np
import pytest

from tests.jobs import needs

pytestmark = needs("torch", "horovod")

torch = pytest.importorskip("torch")

RANK = 2
# Of these, only the last is large enough to be sent by its factors.
SHAPES = {"conv": (4, 2, 2, 2), "bias": (8,), "full": (30, 40)}


class Model(torch.nn.Module):
    """Its gradients are what the input says."""

    def __init__(self):
        super().__init__()
        for name, shape in SHAPES.items():
            self.register_parameter(name, torch.nn.Parameter(torch.zeros(shape)))

    def forward(self, wanted):
        return sum((p * g).sum() for p, g in zip(self.parameters(), wanted, strict=True))


@pytest.fixture
def group():
    """A process group of this process alone."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", address, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_the_table_of_what_a_user_would_pick_instead(tmp_path, capsys):
    from benchmarks.convergence import peers

    arguments = ["--tasks", "digits", "--seeds", "0", "--steps", "3", "--folder", str(tmp_path)]
    assert (
        peers.main([*arguments, "--jobs", "1", "--peers", "dense", "powersgd-1", "dls-0.01"]) == 0
    )
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if " | " in line]
    sent = {row[0].strip("| "): float(row[1]) for row in rows[2:]}
    assert 0 < sent["DLS, 1 %"] < sent["dense"]
    assert 0 < sent["PowerSGD, rank 1"] < sent["dense"]


def gradients(step):
    generator = np.random.default_rng(step)
    return {n: generator.standard_normal(s).astype(np.float32) for n, s in SHAPES.items()}


def test_one_worker_approximates_as_torchs_hook_does(group):
    """From the same first matrix on: theirs is random, and taken over."""
    from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook

    from benchmarks.convergence.powersgd import PowerSGDJob

    state = powerSGD_hook.PowerSGDState(None, RANK, start_powerSGD_iter=2)
    theirs = torch.nn.parallel.DistributedDataParallel(Model(), bucket_cap_mb=100)
    theirs.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    ours = PowerSGDJob(Model(), 1, RANK, dense_steps=2)
    for step in range(6):
        theirs.zero_grad(set_to_none=True)
        theirs([torch.from_numpy(g) for g in gradients(step).values()]).backward()
        expected = {n: p.grad.numpy().reshape(-1) for n, p in theirs.module.named_parameters()}
        reduced = ours.reduced([{n: g.reshape(-1) for n, g in gradients(step).items()}])
        if step == 2:  # the first that is approximated: of different random matrices
            ours._right["full"] = last_right(state)
            ours._errors[0]["full"] = gradients(step)["full"] - expected["full"].reshape(30, 40)
            continue
        for name in SHAPES:
            np.testing.assert_allclose(reduced[name], expected[name], rtol=2e-3, atol=2e-4)
    assert ours.sent_bytes == 4 * (8 + 32 + RANK * (30 + 40))


def last_right(state):
    """Their right factor of the one matrix that pays."""
    (everything,) = state.q_memory_dict.values()
    return everything[: 40 * RANK].numpy().reshape(40, RANK).copy()
