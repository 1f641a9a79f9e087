"""Without a job: imports, one rank, options, pickling.  Each in a process of its own, because
horovod.torch and horovod.tensorflow do not go into one."""

import subprocess
import sys

import pytest

from tests.jobs import JOB, ROOT, needs

pytestmark = needs("torch")

ONE_RANK = """
import horovod.torch as hvd, torch
from hvd_dls.torch import DLSCompressor
hvd.init()
trained = []
for compression in (hvd.Compression.none, DLSCompressor, DLSCompressor(density=0.01)):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 2))
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        named_parameters=model.named_parameters(), compression=compression)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(4, 64)).square().sum().backward()
        optimizer.step()
    trained.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
assert torch.equal(trained[0], trained[1]) and torch.equal(trained[0], trained[2])
"""

PROGRAMS = {
    "the package imports no framework": """
import hvd_dls, sys
assert not {"torch", "tensorflow", "horovod", "numba"} & set(sys.modules)
""",
    "the torch adapter does not import tensorflow": """
import hvd_dls.torch, sys
assert "torch" in sys.modules and "tensorflow" not in sys.modules
""",
    "one rank trains as without compression": ONE_RANK,
    "one rank under elastic Horovod, which then calls the compressor, too": (
        "import os; os.environ['HOROVOD_ELASTIC'] = '1'" + ONE_RANK
    ),
    "an unknown option is named with those that exist": """
from hvd_dls import DLSError
from hvd_dls.torch import DLSCompressor
try:
    DLSCompressor(ratio=0.1)
except DLSError as error:
    assert "'ratio'" in str(error) and "density" in str(error)
else:
    raise AssertionError
""",
    "what are no named parameters is said": """
from hvd_dls import DLSError
from hvd_dls.torch import DLSCompressor
import torch
for wrong in ("a", [torch.zeros(3)], [("a", 1)],
              [("a", torch.nn.Parameter(torch.zeros(2, dtype=torch.complex64)))]):
    try:
        DLSCompressor(wrong)
    except DLSError as error:
        assert "(name, parameter)" in str(error) or "'a' has type torch.complex64" in str(error)
    else:
        raise AssertionError(wrong)
""",
    "a number as the first argument is told to be no density, nor a process set": """
from hvd_dls import DLSError
from hvd_dls.torch import DLSCompressor
try:
    DLSCompressor(0.01)
except DLSError as error:
    assert "write DLSCompressor(density=0.01)" in str(error)
else:
    raise AssertionError
try:
    DLSCompressor(process_set=3)
except DLSError as error:
    assert "process_set=3: accepted is an hvd.ProcessSet" in str(error)
else:
    raise AssertionError
""",
    "who looks for the compressor in the package itself is told where it is": """
import hvd_dls
try:
    from hvd_dls import DLSCompressor
except ImportError as error:
    assert "from hvd_dls.torch import DLSCompressor" in str(error)
else:
    raise AssertionError
assert not hasattr(hvd_dls, "DLSCompressors")
""",
    "a compressor is shown with its options": """
from hvd_dls.torch import DLSCompressor
shown = repr(DLSCompressor(density=0.5, values="bfloat16"))
assert shown == "DLSCompressor(density=0.5, values='bfloat16')", shown
""",
    "pickling keeps the options; what knows a model is refused": """
import copy, pickle, torch
from hvd_dls import DLSError
from hvd_dls.torch import DLSCompressor
model = torch.nn.Linear(3, 3)
again = pickle.loads(pickle.dumps(DLSCompressor(density=0.5, min_k=2)))
assert (again.config.density, again.config.min_k, again._bindings) == (0.5, 2, [])
assert pickle.loads(pickle.dumps(DLSCompressor)) is DLSCompressor
for of in (pickle.dumps, copy.deepcopy):
    try:
        of(DLSCompressor(model.named_parameters()))
    except DLSError as error:
        assert "named_parameters" in str(error) and "state_dict" in str(error)
    else:
        raise AssertionError
""",
    "parameters are not kept alive": """
import gc, torch, weakref
from hvd_dls.torch import DLSCompressor
model = torch.nn.Linear(3, 3)
compressor = DLSCompressor(model.named_parameters())
gone = weakref.ref(model.weight)
del model
gc.collect()
assert gone() is None and compressor._given.named() == []
""",
}


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_in_one_process(program):
    job = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=JOB
    )
    assert job.returncode == 0, job.stderr
