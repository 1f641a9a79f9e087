# mypy: allow-untyped-defs
"""Booking a step on a GPU: residuals and sums over ranks, in one pass over a layer.

The layer is divided into blocks of indices, a program each.  Within a block ranks follow each
other, with a barrier between, so sums are added in rank order on every rank and have the same bits
everywhere, without atomic additions.  Where each rank's entries of a block begin, a kernel before
it finds by bisection.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from hvd_dls.torch.kernels.launching import on

BLOCK = 2048  # entries of a program
LANES = 128  # of a list's entries that it takes at a time
TILE = 256  # blocks that a program of ``begins`` looks for

# In a sum's memory: nothing came in yet.  No sum from +0 on, rounded to nearest, is ever -0.
_UNTOUCHED = tl.constexpr(-(2**31))


@triton.jit
def bisect(indices, low, high, wanted, steps):
    """Between two places each, the first whose index is not less than wanted."""
    for _ in range(steps):
        middle = (low + high) // 2
        open_ = low < high
        less = tl.load(indices + middle, mask=open_, other=0) < wanted
        low, high = (
            tl.where(open_ & less, middle + 1, low),
            tl.where(open_ & (less == 0), middle, high),
        )
    return low


@triton.jit(do_not_specialize=["blocks", "steps"])
def begins(
    indices,  # uint32 as int32, ascending within each list: all lists, one after the other
    ends,  # (lists + 1,) int32: where each list begins, and where the last one ends
    starts,  # (lists, blocks + 1) int32
    blocks,
    steps,  # of the bisection
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Finds where the entries of each block begin in each list."""
    own = tl.program_id(0)
    places = tl.program_id(1) * TILE + tl.arange(0, TILE)
    low = tl.zeros([TILE], tl.int32) + tl.load(ends + own)
    high = tl.zeros([TILE], tl.int32) + tl.load(ends + own + 1)
    low = bisect(indices, low, high, places * BLOCK, steps)
    tl.store(starts + own * (blocks + 1) + places, low, mask=places <= blocks)


@triton.jit
def block(
    residual,
    gradient,
    total,
    out,
    n,
    own,  # number of the block in its layer
    indices,
    values,
    starts,
    slot,  # the block's place in a row of ``starts``
    row,  # length of a row
    lists,
    scale,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    """Does one block: see ``settle``."""
    at = own * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    if HAS_RESIDUAL:
        old = tl.load(residual + at, mask=inside, other=0.0)
        new = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(residual + at, old + new, mask=inside)
    nothing = tl.full([BLOCK], _UNTOUCHED, tl.int32)
    tl.store(total + at, nothing.to(tl.float32, bitcast=True), mask=inside)
    tl.debug_barrier()
    lane = tl.arange(0, LANES)
    if HAS_RESIDUAL:
        first, last = tl.load(starts + slot), tl.load(starts + slot + 1)
        for start in range(first, last, LANES):
            entry = start + lane
            index = tl.load(indices + entry, mask=entry < last, other=0)
            kept = tl.load(values + entry, mask=entry < last, other=0.0)
            tl.store(residual + index, kept, mask=entry < last)
    for rank in range(1, lists):
        here = starts + rank * row + slot
        first, last = tl.load(here), tl.load(here + 1)
        for start in range(first, last, LANES):
            entry = start + lane
            index = tl.load(indices + entry, mask=entry < last, other=0)
            sent = tl.load(values + entry, mask=entry < last, other=0.0)
            before = tl.load(total + index, mask=entry < last, other=0.0)
            touched = before.to(tl.int32, bitcast=True) != _UNTOUCHED
            tl.store(total + index, tl.where(touched, before, 0.0) + sent, mask=entry < last)
        tl.debug_barrier()  # the next rank's entries may be the same
    sums = tl.load(total + at, mask=inside, other=0.0)
    touched = sums.to(tl.int32, bitcast=True) != _UNTOUCHED
    # Only where something was sent: zero times a negative factor would be -0.
    result = tl.where(touched, sums * scale, 0.0)
    tl.store(out + at, result.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["blocks", "lists"])
def settle(
    residual,  # (n,) float32; or anything, without HAS_RESIDUAL
    gradient,  # (n,) float32, float16 or bfloat16
    total,  # (n,) float32; may be ``out``
    out,  # (n,) float32, float16 or bfloat16; may be the gradient
    n,
    indices,  # as for ``begins``: first what this rank sent, then of each rank
    values,  # float32, as the indices: first what stays in the residual
    starts,
    blocks,
    lists,
    scale,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    """See ``core.passes.settle``, of which this is one block."""
    own = tl.program_id(0)
    block(
        residual, gradient, total, out, n, own, indices, values, starts, own, blocks + 1, lists,
        scale, HAS_RESIDUAL, BLOCK, LANES,
    )  # fmt: skip


def book(
    residual: Tensor | None,
    gradient: Tensor | None,
    lists: Sequence[tuple[np.ndarray, np.ndarray]],
    scale: float,
    out: Tensor,
) -> None:
    """Launches the kernels.

    Args:
        residual: (n,) float32; None where there is none on this rank.
        gradient: (n,), as ``out``; None without a residual.
        lists: (indices uint32 ascending, values float32): first of what this rank sent, with what
            stays of it in the residual, then of what each rank sent.
        scale: multiplies the sum.
        out: (n,) float32, float16 or bfloat16.
    """
    n, device = len(out), out.device
    blocks, longest = triton.cdiv(n, BLOCK), max(len(indices) for indices, _ in lists)
    with on(device):
        ends, indices, values = _on_device(lists, device)
        total = out if out.dtype == torch.float32 else torch.empty(n, device=device)
        starts = torch.empty((len(lists), blocks + 1), dtype=torch.int32, device=device)
        grid = (len(lists), triton.cdiv(blocks + 1, TILE))
        begins[grid](indices, ends, starts, blocks, longest.bit_length(), BLOCK, TILE)
        own = residual is not None
        settle[(blocks,)](
            residual if own else total, gradient if own else total, total, out, n,
            indices, values, starts, blocks, len(lists), scale, own, BLOCK, LANES,
        )  # fmt: skip


def _on_device(
    lists: Sequence[tuple[np.ndarray, np.ndarray]], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Where each list begins and ends, all indices, all values: copied at once, without waiting."""
    sizes = [len(indices) for indices, _ in lists]
    entries = sum(sizes)
    padded = entries + -entries % 16  # so that all parts are aligned alike
    staged = torch.empty(
        2 * padded + len(sizes) + 1, dtype=torch.int32, pin_memory=device.type == "cuda"
    )
    host = staged.numpy()
    np.concatenate([indices.view(np.int32) for indices, _ in lists], out=host[:entries])
    values = host[padded : padded + entries].view(np.float32)
    np.concatenate([values_of for _, values_of in lists], out=values)
    host[2 * padded] = 0
    np.cumsum(sizes, out=host[2 * padded + 1 :])
    there = staged.to(device, non_blocking=True)
    return there[2 * padded :], there[:padded], there[padded : 2 * padded].view(torch.float32)
