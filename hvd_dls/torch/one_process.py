"""One process: options hold as they do on several, with nothing sent.

Horovod does not give gradients to a compressor then.  So that a script that is debugged on one
process trains the same way as on two, they pass here, right before the weights are updated.  By
then whoever scales the loss (``torch.amp.GradScaler``) has divided them by its scale.
"""

from __future__ import annotations

from typing import Any

import horovod.torch as hvd
import torch

from hvd_dls.adapter import World
from hvd_dls.torch.compressor import DLSCompressor
from hvd_dls.torch.refusals import refuse_other_moments, refuse_sparse_gradients


def apply_options(compressor: DLSCompressor, optimizer: Any) -> None:
    """Clips gradients, gives them momentum, and refuses or skips what is not finite.

    Args:
        compressor: whose options they are.
        optimizer: Horovod's, of one process, about to update the weights.

    Raises:
        NonFiniteGradientError: a gradient holds NaN or Inf, with nonfinite="raise".
        DLSError: see ``DLSCompressor.binding_of`` and ``refuse_sparse_gradients``.
    """
    binding = compressor.binding_of(optimizer)
    refuse_other_moments(optimizer, compressor.config)  # a scheduler may have set some
    if optimizer.sparse_as_dense:  # what Horovod does where it reduces
        for _, parameter in binding.parameters.named():
            if parameter.grad is not None and parameter.grad.is_sparse:
                parameter.grad = parameter.grad.to_dense()
    every = (parameter for _, parameter in binding.parameters.named())
    refuse_sparse_gradients(optimizer, every, compressor.config)
    named = [
        (name, parameter)
        for name, parameter in binding.parameters.named()
        if parameter.grad is not None and not parameter.grad.is_sparse
    ]
    if not named:
        return
    averages = optimizer.op == hvd.Average
    alone = World(rank=0, size=1, local_size=1, set_id=0, averages=averages)
    session = binding.session if binding.agreed else None
    session = session or binding.agree(alone)
    session.abandon()  # what an exception may have left of the step before
    corrects = session.corrects  # what waits is gone when the step ends
    arrays = {}
    for name, parameter in named:
        assert parameter.grad is not None
        session.note(name, finite=True)  # its sum is looked at
        whole = binding.array(name, parameter.grad)
        arrays[name] = session.correct(name, whole) if corrects else whole
    counts = [session.accept(name, array) for name, array in arrays.items()]
    for name, parameter in named:
        if not all(counts):
            parameter.grad = None
        elif corrects and parameter.grad is not None:
            parameter.grad.copy_(torch.as_tensor(arrays[name]).view(parameter.grad.shape))
