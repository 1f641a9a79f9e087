"""The same step with torch's DistributedDataParallel (DDP), as who does not use Horovod would."""

from __future__ import annotations

import os
import socket
from typing import Any

import horovod.torch as hvd
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from benchmarks.common.synthetic_model import SyntheticModel
from benchmarks.rounds.methods import Method, RunningMethod

DDP = ("ddp", "ddp-fp16", "powersgd")
# With several buckets, PowerSGD's hook over Gloo crashes with four ranks (torch 2.13).
ONE_BUCKET_MB = 1 << 20
_MATRICES_FROM_STEP = 2  # the first that PowerSGD's hook accepts


class RunningDDP(RunningMethod):
    """A method of DDP over Gloo, in the processes and over the links of Horovod's."""

    first_steps = _MATRICES_FROM_STEP + 2  # DDP makes its buckets anew after the first

    def _set_up(self, bucket_bytes: int | None) -> None:
        connect()
        named = {name: p.shape for name, p in self._model.named_parameters()}
        model = SyntheticModel(named, self._gradients.last_drawn)
        self._parameters = [p for _, p in model.named_parameters()]
        self._model, self._state = with_ddp(model, self.method, _MATRICES_FROM_STEP)

    def handed_over(self) -> dict[str, float]:
        """See ``RunningMethod``."""
        width = 2 if self.method.compression == "ddp-fp16" else 4
        sent = sum(width * self._numbers_of(p) for p in self._parameters)
        return {"allgather": 0.0, "allreduce": float(sent), "entries": 0.0}

    def _numbers_of(self, parameter: torch.Tensor) -> int:
        """How many numbers are reduced for a parameter's gradient."""
        if self.method.rank is None or parameter.dim() < 2:
            return parameter.numel()
        rows = parameter.shape[0]
        columns = parameter.numel() // rows
        rank = min(self.method.rank, rows, columns)
        pays, whole, factors = powerSGD_hook._should_compress(
            rows, columns, rank, self._state.min_compression_rate
        )
        return int(factors if pays else whole)


def with_ddp(
    model: torch.nn.Module, method: Method, matrices_from: int
) -> tuple[DistributedDataParallel, Any]:
    """Puts DDP around a model, with the hook of a method.

    Args:
        model: to be trained.
        method: one of DDP.
        matrices_from: the first step in which PowerSGD's matrices take the place of gradients.

    Returns:
        What is to be called instead of the model, and the state of PowerSGD's hook or None.
    """
    powersgd, state = method.compression == "powersgd", None
    options: dict[str, Any] = {"bucket_cap_mb": ONE_BUCKET_MB} if powersgd else {}
    # Statistics of batch norm stay each rank's own, as with Horovod: less to send.
    wrapped = DistributedDataParallel(model, broadcast_buffers=False, **options)
    if powersgd:
        state = powerSGD_hook.PowerSGDState(
            None, method.rank or 1, start_powerSGD_iter=matrices_from
        )
        wrapped.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    elif method.compression == "ddp-fp16":
        # Over Gloo there is no bf16: torch 2.13 refuses its hook, and reducing bfloat16 hangs.
        wrapped.register_comm_hook(None, default_hooks.fp16_compress_hook)
    return wrapped, state


def connect() -> None:
    """Makes DDP's group of all processes, over the network interface that Horovod uses."""
    if dist.is_initialized():
        return
    interface = os.environ.get("HOROVOD_GLOO_IFACE")
    if interface:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    own: Any = None
    if hvd.rank() == 0:
        own = (socket.gethostname(), _free_port())
    host, port = hvd.broadcast_object(own, name="ddp.address")
    dist.init_process_group("gloo", f"tcp://{host}:{port}", rank=hvd.rank(), world_size=hvd.size())


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("", 0))
        return int(listening.getsockname()[1])
