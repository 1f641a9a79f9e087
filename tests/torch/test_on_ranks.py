"""Everything in with_ranks/, as real horovodrun jobs of 2 and 4 ranks."""

import pytest

from tests.jobs import horovodrun, pytest_on_ranks


@pytest.mark.parametrize("ranks", [2, 4])
def test_torch_on_ranks(ranks):
    output = pytest_on_ranks(ranks, "tests/torch/with_ranks")
    assert output.count(" passed") == ranks, output


JOIN = """
import horovod.torch as hvd
from horovod.common.exceptions import HorovodInternalError
from hvd_dls.torch import DLSCompressor
from tests.torch.with_ranks.training import SPARSE, net, train, wrap

hvd.init()
model = net()
compression = DLSCompressor(model.named_parameters(), density=0.05, **SPARSE)
optimizer = wrap(model, compression)
train(model, optimizer, range({steps}))
try:
    hvd.join() if hvd.rank() == 0 else train(model, optimizer, [9])
except HorovodInternalError as error:
    print("ended with", error, flush=True)
"""


@pytest.mark.parametrize("steps", [0, 3], ids=["first step", "later step"])
def test_joining_while_others_train_ends_with_an_explanation(steps):
    output = horovodrun(2, ["-c", JOIN.format(steps=steps)], time_limit=60)
    assert "Give every rank the same number of batches" in output
