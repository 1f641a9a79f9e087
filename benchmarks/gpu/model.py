"""A model that consists of gradients only, and its session, alone in a process.

What other ranks would send is what this one sends, once for each of them: the same lengths and the
same work, but all ranks' entries coincide.  Layers that go dense are only looked at, whether they
are finite: to reduce them is Horovod's work.
"""

from __future__ import annotations

import importlib
import zlib

import numpy as np
import torch
from torch import Tensor

from benchmarks.common.internals import Session, layer_spec
from benchmarks.common.shapes import Shapes
from benchmarks.gpu.passes import Make, on_device
from hvd_dls.config import DLSConfig

Looks = importlib.import_module(f"{on_device().__package__}.looking").Looks

_SPREAD = 100.0  # layers' scales are log-uniform between 1 / _SPREAD and 1
_OFFSETS = 1 << 20  # how many places there are where a gradient's noise may begin


class Gradients:
    """Gradients of all layers, each in memory of its own, drawn anew for each step.

    Args:
        shapes: of the model's parameters.
        device: where.

    Attributes:
        tensors: (n,) float32 of each layer, by name, in model order.
    """

    def __init__(self, shapes: Shapes, device: torch.device) -> None:
        sizes = {name: int(np.prod(shape)) for name, shape in shapes.items()}
        generator = torch.Generator(device).manual_seed(0)
        noise = torch.empty(max(sizes.values()) + _OFFSETS, device=device)
        self._noise = noise.exponential_(generator=generator)
        self._noise.sub_(torch.empty_like(noise).exponential_(generator=generator))
        rng = np.random.default_rng(0)
        self._scales = np.exp(rng.uniform(-np.log(_SPREAD), 0, len(sizes))).tolist()
        self.tensors = {name: torch.empty(size, device=device) for name, size in sizes.items()}
        self.begin_anew()
        self.draw()

    def begin_anew(self) -> None:
        """Has the steps to come draw what the first ones drew."""
        self._offsets = np.random.default_rng(1)

    @property
    def entries(self) -> int:
        """Of all layers."""
        return sum(map(len, self.tensors.values()))

    def draw(self) -> None:
        """Overwrites all gradients with Laplace noise, each with its layer's scale."""
        for gradient, scale in zip(self.tensors.values(), self._scales, strict=True):
            offset = int(self._offsets.integers(_OFFSETS))
            torch.mul(self._noise[offset : offset + len(gradient)], scale, out=gradient)


class Model:
    """A model's session, with all layers on the device.

    Args:
        shapes: of the model's parameters.
        gradients: of these shapes.
        density: of the compressed layers; all other options are the defaults.
        make: makes a layer's backend.
        ranks: how many the session is told that there are.
        one_by_one: whether the host is told of each layer that goes dense by itself, as it was
            before there were ``Looks``.

    Attributes:
        session: of rank 0.
        ranks: how many it believes there are.
    """

    def __init__(
        self,
        shapes: Shapes,
        gradients: Gradients,
        density: float,
        make: Make,
        ranks: int,
        one_by_one: bool = False,
    ) -> None:
        layers = [layer_spec(name, shape) for name, shape in shapes.items()]
        config = DLSConfig.from_options(density=density)
        backends = {layer.name: make() for layer in layers}
        self.session = Session(layers, config, ranks, backends=backends)
        self.session.agree(self.session.agreed())
        self.ranks = ranks
        self._gradients = gradients
        self._order = list(reversed(shapes))  # as backward has it
        self._look = on_device().finite_future if one_by_one else Looks().look
        gradients.begin_anew()

    def begin(self) -> None:
        """Begins a step."""
        self._packed: dict[int, np.ndarray] = {}
        self.session.begin()

    def come_in(self, name: str) -> None:
        """Does for a layer what a hook of backward does, but for ``pack_ready``."""
        session, gradient = self.session, self._gradients.tensors[name]
        if session.is_sparse(name):
            session.compress(name, gradient)
        else:
            asked = session.bucket_of(name) is not None
            session.note(name, self._look(gradient) if asked else True)

    def pack_ready(self) -> None:
        """Packs the buckets of which the device has done all, as a hook of backward does."""
        for bucket in self.session.ready():
            self._packed[bucket] = self.session.payload(bucket)

    def compress(self) -> None:
        """Has all layers come in."""
        for name in self._order:
            self.come_in(name)
            self.pack_ready()

    @property
    def order(self) -> list[str]:
        """Names of all layers as they come in."""
        return self._order

    def payloads(self) -> dict[int, np.ndarray]:
        """Waits for the device and packs the rest; returns all payloads."""
        for bucket in self.session.unfinished():
            self._packed[bucket] = self.session.payload(bucket)
        return self._packed

    def receive(self, payloads: dict[int, np.ndarray]) -> None:
        """Takes what all ranks would have sent."""
        for bucket, payload in payloads.items():
            self.session.receive(bucket, np.tile(payload, self.ranks))

    def decompress(self) -> None:
        """Writes all sums where the gradients are, and ends the step."""
        for name in self._order:
            if self.session.is_sparse(name):
                self.session.decompress(name, self._gradients.tensors[name], 1 / self.ranks)
            else:
                self.session.accept(name)

    def checksum(self) -> int:
        """CRC-32 of all residuals and sums, as the last step has left them."""
        checksum = 0
        for array in (*self.session.residuals.values(), *self._gradients.tensors.values()):
            checksum = zlib.crc32(array.cpu().numpy(), checksum)
        return checksum

    def draw(self) -> None:
        """Draws the gradients of the step to come."""
        self._gradients.draw()

    def step(self) -> None:
        """Does a whole step with new gradients."""
        self.draw()
        self.begin()
        self.compress()
        self.receive(self.payloads())
        self.decompress()


def plain_add(residuals: list[Tensor], gradients: list[Tensor]) -> None:
    """Adds all gradients to something of their size, layer by layer."""
    for residual, gradient in zip(residuals, gradients, strict=True):
        residual.add_(gradient)
