"""Rounds of local steps, for the tests of ``LocalSteps``."""

import torch
from torch import nn

from hvd_dls.torch import DLSCompressor, LocalSteps
from tests.torch.with_ranks.training import SPARSE, batch, net_without_vectors


def start(model=None, every=3, lr=1.0, momentum=0.0, optimizer=torch.optim.Adam, **options):
    """Model, its optimizer, and rounds."""
    model = model or net_without_vectors()
    compression = DLSCompressor(**{"density": 0.05} | SPARSE | options)
    rounds = LocalSteps(model, compression, every=every, lr=lr, momentum=momentum)
    return model, optimizer(model.parameters(), lr=0.01), rounds


def train(model, optimizer, rounds, steps):
    """Returns in which steps a round has ended."""
    ended = []
    for step in steps:
        optimizer.zero_grad()
        images, labels = batch(step)
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        if rounds.step():
            ended.append(step)
    return ended
