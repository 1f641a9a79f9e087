"""Devices to test on, and the core's arrays as tensors there."""

import numpy as np
import pytest
import torch

no_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU: torch.cuda.is_available() is False"
)
on_each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=no_gpu)])


def tensor(array, device):
    """A copy of an array of the core's on a device; uint16 is bfloat16."""
    if array.dtype == np.uint16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16).to(device)
    return torch.from_numpy(array.copy()).to(device)


def array_of(values):
    """A copy of a tensor as the core has it."""
    values = values.detach().cpu().clone()
    if values.dtype == torch.bfloat16:
        return values.view(torch.int16).numpy().view(np.uint16)
    return values.numpy()
