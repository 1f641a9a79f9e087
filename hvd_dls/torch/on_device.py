"""Layers whose gradients are on a GPU: all that is as long as a gradient stays there.

The same passes as the core's, in torch's own operations, which run on any device; the same bits as
the core's on a CPU, but for the choice among entries that tie at the threshold.  To the host comes
what is sent, and from there what all ranks sent.

``find`` and ``finite_future`` run in hooks of backward and never wait: shapes are known beforehand,
and what the host needs is copied behind the device's work, with an event that tells when it is
there.
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Collection, Sequence
from functools import cache, partial
from importlib import metadata
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hvd_dls.config import ALLGATHER, DLSConfig
from hvd_dls.core.balancing.sketch import BELOW, LAST_BASE, MANTISSA_SHIFT, N_BINS, WINDOW
from hvd_dls.core.received import Received
from hvd_dls.core.selection.adam import Factors, Moments
from hvd_dls.core.selection.backend import Future
from hvd_dls.core.selection.norms import Norm
from hvd_dls.core.selection.passes import Found, found_on_device
from hvd_dls.core.selection.passes_numpy import sample_stride
from hvd_dls.core.session import log
from hvd_dls.core.session.baselines import BASELINES
from hvd_dls.errors import DLSError
from hvd_dls.torch.futures import DeviceFuture
from hvd_dls.torch.parameters import Parameters, stays_on_device

if TYPE_CHECKING:
    from hvd_dls.torch.kernels.selector import Selector
    from hvd_dls.torch.kernels.together import Together


# "1" in the environment: layers share launches. They have not run on a GPU yet, so not by default.
SHARED_LAUNCHES = "HVD_DLS_SHARED_LAUNCHES"
TOO_LARGE = 2**31 - 2**20  # entries of a layer, for the kernels


class Device:
    """A ``Backend`` of one layer: arrays are flat tensors on this device.

    Args:
        device: of the parameter.
        kernels: whether ``find`` and ``settle`` are fused kernels (``hvd_dls.torch.kernels``), of
            float32 residuals; False: torch's operations; None: kernels on a GPU, if they run.
        together: of several layers, to whose kernels these are put off; None: each layer has its
            own launches, at once.  Without kernels it is not looked at.

    Raises:
        DLSError: kernels are asked for, but Triton is missing or too old.
    """

    def __init__(
        self,
        device: torch.device,
        kernels: bool | None = None,
        together: Together | None = None,
    ) -> None:
        self._device, self._together = device, together
        if kernels and not have_triton():
            raise DLSError("kernels=True needs Triton >= 3.4: pip install 'triton>=3.4'")
        self._selector: Selector | None = None
        if device.type == "cuda" and kernels_run(device) if kernels is None else kernels:
            from hvd_dls.torch.kernels.selector import Selector  # seconds to import

            self._selector = Selector()

    def zeros(self, size: int, dtype: np.dtype) -> Tensor:
        return torch.zeros(size, dtype=getattr(torch, dtype.name), device=self._device)

    def load(self, array: Tensor, saved: Any) -> None:
        array.copy_(torch.as_tensor(saved))

    def scale(self, array: Tensor, factor: float) -> None:
        array.mul_(factor)

    def copy(self, array: Tensor) -> Tensor:
        return array.clone()

    def to_host(self, array: Tensor) -> np.ndarray:
        host: np.ndarray = array.cpu().numpy()
        return host

    def clear(self, array: Tensor, indices: np.ndarray) -> None:
        (where,) = self._indices([indices])
        array.index_fill_(0, where, 0)

    def fill(self, out: Tensor, value: float) -> None:
        out.fill_(value)

    def add(self, array: Tensor, other: Tensor) -> None:
        array.add_(other)

    def finite(self, array: Tensor) -> bool:
        return finite_future(array).result()

    def histogram(self, array: Tensor) -> np.ndarray:
        counts = torch.bincount(_bins(array.abs()), minlength=N_BINS)
        return self.to_host(counts)

    # Find ---------------------------------------------------------------------------------------

    def find(
        self, residual: Tensor, gradient: Tensor, k: int, last_threshold: float = 0.0
    ) -> Future[Found | None]:
        """See ``core.passes.find``; of entries that tie at the threshold, any may be chosen."""
        exact = partial(self._find, residual, gradient, k)
        usable = 0 < last_threshold < math.inf and 4 * k <= len(residual)
        if self._selector is None or not usable or not _short_float32(residual):
            return exact()
        find = self._selector.find
        if self._together is not None:
            find = partial(self._together.searches.put_off, self._selector)
        return find(residual, gradient, k, last_threshold, exact)

    def _find(self, residual: Tensor, gradient: Tensor, k: int) -> DeviceFuture[Found | None]:
        """In torch's operations, which sort: several times slower, but of any threshold."""
        # Types are promoted within one operation: float16 and bfloat16 are not copied before.
        magnitudes = (residual + gradient).abs_()
        largest, chosen = magnitudes.topk(k, sorted=False)  # NaN counts as the largest
        chosen = chosen.sort().values
        values = residual.index_select(0, chosen) + gradient.index_select(0, chosen)
        stride = sample_stride(len(residual))
        unsent = _bins(magnitudes.index_fill_(0, chosen, 0)[::stride])
        base = (_bins(largest.min()) - BELOW).clamp_(0, LAST_BASE)
        window = base + torch.arange(WINDOW, dtype=base.dtype, device=base.device)
        counts = (unsent == window[:, None]).sum(1)
        sent = torch.cat([values.view(torch.int32), chosen.int(), counts.int()])
        return DeviceFuture(sent, partial(_found, k, np.dtype(_name(values.dtype)), stride))

    # Settle -------------------------------------------------------------------------------------

    def settle(
        self,
        residual: Tensor,
        gradient: Tensor,
        indices: np.ndarray,
        kept: np.ndarray | None,
        received: Sequence[tuple[np.ndarray, np.ndarray]],
        scale: float,
        out: Tensor,
    ) -> None:
        """See ``core.passes.settle``; indices must ascend and lie within the layer.

        Without atomic additions (``index_add_``), which on GPUs take subnormal float32 for zero: a
        rank's indices are unique, and ranks follow each other.
        """
        if self._selector is not None and _short_float32(residual):
            if self._together is not None and isinstance(received, Received):
                self._together.bookings.put_off(
                    residual, gradient, indices, kept, received, scale, out
                )
                return
            from hvd_dls.torch.kernels.settling import book

            left_over = np.zeros(len(indices), np.float32) if kept is None else kept
            book(residual, gradient, [(indices, left_over), *received], scale, out)
            return
        own, *where = self._indices([indices, *(entries for entries, _ in received)])
        nothing = np.empty(0, _name(residual.dtype))
        values = [nothing if kept is None else kept, *(values for _, values in received)]
        sizes = [len(array) for array in values]
        left, *theirs = torch.split(self._joined(values, residual.dtype), sizes)
        residual.add_(gradient)
        if kept is None:
            residual.index_fill_(0, own, 0)
        else:
            residual.index_copy_(0, own, left)
        total = out if out.dtype == residual.dtype else torch.empty_like(residual)
        total.zero_()
        for entries, sent in zip(where, theirs, strict=True):
            total.index_copy_(0, entries, total.index_select(0, entries).add_(sent))
        if where:  # only where something was sent: zero times a negative factor would be -0
            everywhere = torch.cat(where)
            total.index_copy_(0, everywhere, total.index_select(0, everywhere).mul_(scale))
        if total is not out:
            out.copy_(total)

    def finish(self) -> None:
        if self._together is not None:
            self._together.bookings.launch()

    def sum_up(
        self,
        received: Sequence[tuple[np.ndarray, np.ndarray]],
        scale: float,
        out: Tensor,
        dtype: np.dtype,
    ) -> None:
        """See ``core.passes.sum_up``."""
        if self._selector is not None and dtype == np.float32 and len(out) < TOO_LARGE:
            from hvd_dls.torch.kernels.settling import book

            nothing = np.empty(0, np.uint32), np.empty(0, np.float32)
            book(None, None, [nothing, *received], scale, out)
            return
        unused, none = self.zeros(len(out), dtype), np.empty(0, np.uint32)
        self.settle(unused, unused, none, None, received, scale, out)

    def _indices(self, arrays: Sequence[np.ndarray]) -> Sequence[Tensor]:
        """uint32 arrays as indices that torch takes."""
        bits = self._joined([array.view(np.int32) for array in arrays], torch.int32)
        return torch.split(bits.long() & 0xFFFFFFFF, [len(array) for array in arrays])

    def _joined(self, arrays: Sequence[np.ndarray], dtype: torch.dtype) -> Tensor:
        """Arrays of one type, copied to the device at once, through pinned memory."""
        length, pin = sum(map(len, arrays)), self._device.type == "cuda"
        staged = torch.empty(length, dtype=dtype, pin_memory=pin)
        np.concatenate(arrays, out=staged.numpy())
        return staged.to(self._device, non_blocking=True)

    # Clipping, momentum, Adam -------------------------------------------------------------------

    def correct(
        self,
        gradient: Tensor,
        velocity: Tensor | None,
        into: Tensor,
        config: DLSConfig,
        loss_scale: float = 1.0,
        norm: Norm | None = None,
    ) -> Tensor:
        """See ``core.momentum.correct``; norms are summed up in another order."""
        own = _clipped(gradient.to(into.dtype), config, loss_scale, norm)
        if velocity is None:
            return into.copy_(own)
        torch.mul(velocity, config.momentum, out=into).add_(own)
        return (into * config.momentum).add_(own) if config.nesterov else into

    def update(
        self,
        gradient: Tensor,
        before: Moments,
        into: Moments,
        update: Tensor,
        factors: Factors,
        config: DLSConfig,
        loss_scale: float = 1.0,
        norm: Norm | None = None,
    ) -> None:
        """See ``core.adam.update_of``."""
        own = _clipped(gradient.to(update.dtype), config, loss_scale, norm)
        limited = own.clamp(-factors.limit, factors.limit)
        torch.mul(before.first, factors.first, out=into.first).add_(limited * factors.of_first)
        into.first.add_(own * factors.nothing)
        own = (limited * factors.unscale).square_().mul_(factors.of_second)
        torch.mul(before.second, factors.second, out=into.second).add_(own)
        torch.mul(into.second, factors.debias_second, out=update).sqrt_().add_(factors.epsilon)
        torch.div(into.first * factors.debias_first, update, out=update)

    def norm(self, gradient: Tensor, limit: float | None) -> Tensor:
        """See ``core.norms.l2_norm``; () on this device."""
        own = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        if not len(own):
            return own.new_zeros((), dtype=torch.float64)
        largest = torch.linalg.vector_norm(own, math.inf)
        return _norm(own if limit is None else own.clamp(-limit, limit), largest)


def devices_of(parameters: Parameters, config: DLSConfig) -> dict[str, Device]:
    """Where passes over layers are made that are not on the host, by name."""
    # These strategies look at whole residuals, on the host; hosts and owners add up there.
    if config.strategy in BASELINES or config.hierarchical or config.exchange != ALLGATHER:
        return {}
    there = {name: p for name, p in parameters.named() if stays_on_device(p)}
    types = defaultdict[torch.device, set[torch.dtype]](set)
    for parameter in there.values():
        types[parameter.device].add(parameter.dtype)
    together = {device: together_on(device, of) for device, of in types.items()}
    return {name: Device(p.device, together=together[p.device]) for name, p in there.items()}


def together_on(device: torch.device, types: Collection[torch.dtype]) -> Together | None:
    """What layers of a GPU put their passes off to; None if each is to have its own launches.

    Args:
        device: where they are.
        types: of their parameters.
    """
    wanted = os.environ.get(SHARED_LAUNCHES) == "1"
    if device.type != "cuda" or not wanted or not kernels_run(device):
        return None
    from hvd_dls.torch.kernels.together import Together, runs

    # What gradients have become by momentum, or by clipping, is float32.
    pairs = [(own, kind) for kind in types for own in {kind, torch.float32}]
    right = all(runs(device, *pair) for pair in pairs if torch.float64 not in pair)
    return Together() if right else None


@cache
def have_triton() -> bool:
    """Whether Triton is there, and new enough to count with a mask (``tl.histogram``)."""
    try:
        major, minor = metadata.version("triton").split(".")[:2]
    except metadata.PackageNotFoundError:  # a mere folder of that name can be imported, too
        return False
    return (int(major), int(minor)) >= (3, 4)


@cache
def kernels_run(device: torch.device) -> bool:
    """Whether the kernels do what they should on a device; tried once, which compiles them.

    Triton may be there and not run: it needs a C compiler, and a card that it knows.
    """
    if not have_triton():
        return False
    gradient = torch.zeros(1 << 21, device=device)  # enough for as many programs as there may be
    gradient[5 :: 1 << 17] = torch.arange(1.0, 17.0, device=device)
    residual, out = torch.zeros_like(gradient), torch.empty_like(gradient)
    try:
        backend = Device(device, kernels=True)
        found = backend.find(residual, gradient, 16, 1.1).result()
        assert found is not None
        sent = found.indices, found.values
        backend.settle(residual, gradient, found.indices, None, [sent, sent], 0.5, out)
        right = torch.equal(out, gradient) and not residual.any()
    except Exception as error:  # whatever a compiler or driver may raise
        log.no_kernels(f"{type(error).__name__}: {error}")
        return False
    if not right:
        log.no_kernels("their results are wrong")
    return right


def _short_float32(residual: Tensor) -> bool:
    """Whether the kernels take it: they count entries with 32 bits."""
    return residual.dtype == torch.float32 and len(residual) < TOO_LARGE


def finite_future(gradient: Tensor) -> DeviceFuture[bool]:
    """Whether a gradient is free of NaN and Inf."""
    values = gradient.detach().to(torch.promote_types(gradient.dtype, torch.float32))
    ends = torch.stack(values.aminmax()) if values.numel() else values.new_zeros(2)
    return DeviceFuture(ends, lambda array: bool(np.isfinite(array).all()))


def _norm(own: Tensor, largest: Tensor) -> Tensor:
    """() float64, scaled, because squares may overflow; NaN of zeros, and if that is not finite."""
    norm: Tensor = largest * torch.linalg.vector_norm(own / largest, dtype=torch.float64)
    return norm


def _clipped(own: Tensor, config: DLSConfig, loss_scale: float, known: Norm | None) -> Tensor:
    """What is not finite stays so, to be found."""
    if not (config.clip_norm or config.clip_value or known) or not len(own):
        return own
    largest = torch.linalg.vector_norm(own, math.inf)
    if config.clip_value is not None:
        limit = torch.full_like(largest, config.clip_value * loss_scale)
        limit = torch.where(largest.isfinite(), limit, largest)
        own = own.clamp(-limit, limit)
        largest = torch.minimum(largest, limit)
    if known is None and config.clip_norm is not None:
        known = Norm(_norm(own, largest), config.clip_norm * loss_scale)
    if known is not None:
        factor = (known.limit / known.value).clamp_(max=1)
        own = own * factor.nan_to_num_(nan=1.0).to(own.dtype)
    return own


def _bins(magnitudes: Tensor) -> Tensor:
    """``core.sketch.bin_of``, int32; any number for what is not finite."""
    bits = magnitudes.float().view(torch.int32)
    return (bits >> MANTISSA_SHIFT).clamp_(max=N_BINS - 1)


def _found(k: int, dtype: np.dtype, stride: int, sent: np.ndarray) -> Found | None:
    """What ``find`` put into one tensor, taken apart."""
    size = k * dtype.itemsize // sent.itemsize
    values, indices = sent[:size].view(dtype), sent[size : size + k].view(np.uint32)
    return found_on_device(indices, values, sent[size + k :], stride)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
