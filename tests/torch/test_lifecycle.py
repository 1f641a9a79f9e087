"""Ranks that come and go: jobs that lose ranks, begin anew, or have one of them."""

import pytest

from tests.jobs import controller, horovodrun, needs, pytest_on_ranks

pytestmark = needs("torch")

only_gloo = pytest.mark.skipif(
    controller() == "mpi", reason="MPI can neither lose ranks nor be initialised a second time"
)


@pytest.mark.parametrize("elastic", [False, True], ids=["", "elastic"])
def test_torch_on_one_rank(elastic):
    """Horovod passes a compressor by then, but under HOROVOD_ELASTIC=1."""
    env = {"HOROVOD_ELASTIC": "1"} if elastic else {}
    output = pytest_on_ranks(1, "tests/torch/with_one_rank", env=env)
    assert output.count(" passed") == 1, output


@only_gloo
def test_horovod_can_be_started_again_with_as_many_fewer_or_more_ranks():
    output = horovodrun(3, ["-m", "tests.torch.restart_program"])
    for what, ranks in (("as many ranks", 3), ("fewer ranks", 2), ("more ranks", 3)):
        for rank in range(ranks):
            assert f"rank {rank} went on with {what}" in output, output


KILLED = """
import os, signal, time
import horovod.torch as hvd
from horovod.common.exceptions import HorovodInternalError
from hvd_dls.torch import DLSCompressor
from tests.torch.with_ranks.training import SPARSE, net, train, wrap

hvd.init()
# Of the launcher, as soon as it has seen the other rank's end: there are seconds from then on.
signal.signal(signal.SIGTERM, signal.SIG_IGN)
model = net()
optimizer = wrap(model, DLSCompressor(density=0.05, **SPARSE))
train(model, optimizer, range(3))
if hvd.rank() == 1:
    time.sleep(2)  # the other rank waits for this one's payload by then
    os.kill(os.getpid(), signal.SIGKILL)
try:
    train(model, optimizer, [9])
except HorovodInternalError as error:
    print("ended with", " ".join(str(error).split()), flush=True)
"""


@only_gloo
def test_a_rank_that_died_is_not_said_to_have_joined():
    with pytest.raises(pytest.fail.Exception, match="ended with Horovod") as ended:
        horovodrun(2, ["-c", KILLED])
    assert "join" not in str(ended.value).split("ended with Horovod")[1].splitlines()[0]
