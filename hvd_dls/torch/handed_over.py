"""The gradients of a step in progress, and whether they still are what they were when they left.

A gradient is looked at twice: when backward hands it over, for what is sent, and when all ranks'
payloads are there, for what stays in the residual.  Who clips or unscales it in between changes one
and not the other, and of what Horovod reduces whole, each rank sends now this and now that: the
ranks drift apart.  (In plain Horovod it is a race, too, which is mostly won on a fast network.)
"""

from __future__ import annotations

import torch

from hvd_dls.errors import DLSError
from hvd_dls.torch.parameters import Parameters


class HandedOver:
    """Gradients that have come in since a step began, by name."""

    def __init__(self) -> None:
        self._gradients: dict[str, torch.Tensor] = {}
        self._versions: dict[str, int] = {}  # torch counts what changes a tensor in place

    def add(self, name: str, gradient: torch.Tensor) -> None:
        """Remembers a gradient as it is."""
        self._gradients[name] = gradient
        self._versions[name] = gradient._version

    def has_other(self, name: str, gradient: torch.Tensor) -> bool:
        """Whether another tensor than this one has come in for a layer."""
        return self._gradients.get(name, gradient) is not gradient

    def there(self, parameters: Parameters) -> bool:
        """Whether what has come back of a step is still in its gradients, and not zeroed.

        Looks at the gradients themselves, so it is for a step in which something is odd.
        """
        for name, gradient in self._gradients.items():
            parameter = parameters.get(name)
            current = None if parameter is None else parameter.grad
            # (With sparse_as_dense it is a dense copy that came in.)
            if current is None or not (current is gradient or current.is_sparse):
                continue
            if (current._values() if current.is_sparse else current).any():
                return True
        return False

    def check(self, parameters: Parameters) -> None:
        """To be called before the first of them is overwritten; later calls do nothing.

        Args:
            parameters: whose gradients they are.

        Raises:
            DLSError: one was changed, or replaced by another tensor.
        """
        versions, self._versions = self._versions, {}
        for name, version in versions.items():
            gradient, parameter = self._gradients[name], parameters.get(name)
            of_parameter = None if parameter is None else parameter.grad
            # (With sparse_as_dense it is a dense copy that came in.)
            replaced = of_parameter is not gradient and not getattr(of_parameter, "is_sparse", 0)
            if parameter is not None and (replaced or gradient._version != version):
                raise DLSError(
                    f"the gradient of {name!r} was changed between backward() and optimizer."
                    "synchronize() or step(), while it was on its way (by clip_grad_norm_ or "
                    "zero_grad, perhaps). Call optimizer.synchronize() first, then change "
                    "gradients, then `with optimizer.skip_synchronize(): optimizer.step()`. To "
                    "clip, DLSCompressor(clip_global_norm=...) is better: it comes before the "
                    "selection"
                )
