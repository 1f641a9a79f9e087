"""Everything in with_hosts/, on two hosts that this machine pretends to be; and what it takes."""

import pytest

from tests.jobs import controller, horovodrun, needs, pytest_on_ranks

pytestmark = [
    needs("torch"),
    pytest.mark.skipif(controller() == "mpi", reason="mpirun sees that it is one machine"),
]

HERE = "tests/torch/with_hosts"


def test_two_hosts_of_two_ranks():
    output = pytest_on_ranks(4, HERE, per_host=(2, 2))
    assert output.count(" passed") == 4, output


def test_a_host_of_one_rank_and_one_of_two():
    chosen = "density_one or accumulated or shared_out or take_no_part or (given_up and 2)"
    chosen += " or advised"
    output = pytest_on_ranks(3, HERE, "-k", chosen, per_host=(1, 2))
    assert output.count(" passed") == 3, output


PROGRAM = """
import sys
import time
import horovod.torch as hvd
import torch
from hvd_dls.adapter import binding
from hvd_dls.errors import DLSError
from hvd_dls.torch import DLSCompressor
from tests.torch.with_ranks.training import (
    SPARSE, assert_same_on_all_ranks, batch, flat, net, train, wrap,
)

if "given" in sys.argv:
    hvd.init(process_sets=[hvd.ProcessSet(ranks) for ranks in ([0, 1], [2, 3], [0, 2], [1, 3])])
else:
    hvd.init()
if "late" in sys.argv and hvd.rank() == 0:  # until the others have been refused and are gone

    def late(*arguments):
        time.sleep(3)
        return host_sets(*arguments)

    host_sets, binding.host_sets = binding.host_sets, late
torch.manual_seed(1)
model = net()
compression = DLSCompressor(density=0.05, hierarchical=True, **SPARSE)
optimizer = wrap(model, compression)
try:
    train(model, optimizer, range(2))
    optimizer.zero_grad()
    model(batch(2)[0]).square().mean().backward()
    if hvd.rank() % 2:  # in another order on other ranks
        hvd.allreduce(torch.ones(1), name="elsewhere")
    optimizer.step()
    if hvd.rank() % 2 == 0:
        hvd.allreduce(torch.ones(1), name="elsewhere")
except DLSError as error:
    print("refused on rank", hvd.rank(), str(error).replace("\\n", " "), flush=True)
else:
    assert_same_on_all_ranks(flat(model))
    session = compression._bindings[0].session
    print("made by", session.groups.sizes, "of", len(session.plan.sparse), "layers", flush=True)
"""


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return str(path)


STATIC = {"HOROVOD_DYNAMIC_PROCESS_SETS": "0"}


def test_without_process_sets_every_rank_says_what_to_call(program):
    output = horovodrun(4, [program, "late"], env=STATIC, per_host=(2, 2))
    sets = ", ".join(f"hvd.ProcessSet({ranks})" for ranks in ([0, 1], [2, 3], [0, 2], [1, 3]))
    call = f"hvd.init(process_sets=[{sets}])"
    for rank in range(4):
        line = next(x for x in output.splitlines() if f"refused on rank {rank}" in x)
        assert call in line
        assert "HOROVOD_DYNAMIC_PROCESS_SETS=1" in line


def test_with_the_process_sets_that_it_said(program):
    output = horovodrun(4, [program, "given"], env=STATIC, per_host=(2, 2))
    assert output.count("made by (2, 2) of 4 layers") == 4, output


def test_all_ranks_on_one_host_train_densely(program):
    output = horovodrun(2, [program])
    assert output.count("made by (2,) of 0 layers") == 2, output


def test_one_rank_on_each_host_is_as_without_hosts(program):
    output = horovodrun(2, [program], env=STATIC, per_host=(1, 1))
    assert output.count("made by (1, 1) of 4 layers") == 2, output


AHEAD = """
import time
import horovod.torch as hvd
import torch
from hvd_dls.torch import DLSCompressor
from hvd_dls.torch.delivery import Delivery
from tests.torch.with_ranks.training import SPARSE, net, train, wrap

hvd.init()
torch.manual_seed(1)
model = net()
optimizer = wrap(model, DLSCompressor(density=0.05, hierarchical=True, **SPARSE))
train(model, optimizer, range(2))
if hvd.rank() == 2:  # the other host is through meanwhile

    def late(*arguments):
        time.sleep(2)
        hand_on(*arguments)

    hand_on, Delivery._hand_on = Delivery._hand_on, late
train(model, optimizer, [2])
print("made all steps on rank", hvd.rank(), flush=True)
"""


def test_a_host_that_is_through_waits_with_its_end_for_another_that_hands_on():
    output = horovodrun(4, ["-c", AHEAD], per_host=(2, 2))
    assert output.count("made all steps on rank") == 4, output
