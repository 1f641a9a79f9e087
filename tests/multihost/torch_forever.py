"""Run on every rank: trains until something stops it, and reports its start and what stopped it."""

import itertools

import horovod.torch as hvd

from hvd_dls.torch import DLSCompressor
from tests.multihost.report import identity, report
from tests.torch.with_ranks.training import SPARSE, net, train, wrap

hvd.init()
me = identity(hvd)
model = net()
compressor = DLSCompressor(model.named_parameters(), density=0.05, **SPARSE)
optimizer = wrap(model, compressor)
try:
    for step in itertools.count():
        train(model, optimizer, [step])
        if step == 10:
            report(me, "trains")
except Exception as error:
    report(me, "ended", type=type(error).__name__, message=str(error))
    raise
