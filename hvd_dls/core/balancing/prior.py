"""The relative gradient variance of each layer before any gradient was seen.

The paper derives it from how variance propagates through ReLU nets (Eq. 8 and 9).  All functions
return v_l with v_1 = 1; only the proportions matter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from hvd_dls.core.balancing.layers import CONV, LINEAR, LayerSpec
from hvd_dls.errors import DLSError


def paper(layers: Sequence[LayerSpec], norms: np.ndarray | None = None) -> np.ndarray:
    """Eq. 8 (convolution) and Eq. 9 (fully connected), as printed in the paper's appendix.

    Conv: v_l = (k_l k_l c_l) / (k_{l-1} k_{l-1} d_l) v_{l-1}.  Fully connected: v_l = (c_l / d_l)
    v_{l-1}.  Not in the paper: the first fully connected layer behind a convolution counts as a
    convolution over the whole feature map; a depth-wise convolution has as many input channels as
    the layer before it has outputs (groups cancel); a layer of unknown kind takes its
    predecessor's variance.

    Args:
        layers: L layers in the order in which the model applies them.
        norms: not used.

    Returns:
        (L,) float64, v_1 = 1.
    """
    log_v = np.zeros(len(layers))
    for i, (before, layer) in enumerate(pairwise(layers), start=1):
        log_v[i] = log_v[i - 1] + np.log(_factor(before, layer))
    return np.exp(log_v)


def _factor(before: LayerSpec, layer: LayerSpec) -> float:
    if layer.kind == LINEAR:
        return layer.fan_in / (before.kernel * layer.fan_out)
    if layer.kind == CONV:
        depthwise = layer.fan_in == 1 and layer.fan_out % before.fan_out == 0
        channels = before.fan_out if depthwise else layer.fan_in
        return layer.kernel * channels / (before.kernel * layer.fan_out)
    return 1.0


def weight_norm(layers: Sequence[LayerSpec], norms: np.ndarray | None = None) -> np.ndarray:
    """v_l = ||W_1||^2 / ||W_l||^2, the one law the corrected derivation collapses to.

    It needs neither the order of the layers nor their kind.  Ours, not the paper's.

    Args:
        layers: L layers.
        norms: (L,) Frobenius norms of the initial weights, > 0.

    Returns:
        (L,) float64, v_1 = 1.

    Raises:
        DLSError: a norm is missing, zero or not finite; the message names the layer.
    """
    if norms is None or len(norms) != len(layers):
        raise DLSError("prior='weight_norm' needs one weight norm per layer")
    norms = np.asarray(norms, dtype=np.float64)
    for layer, norm in zip(layers, norms, strict=True):
        if not (np.isfinite(norm) and norm > 0):
            raise DLSError(
                f"prior='weight_norm': layer {layer.name!r} has weight norm {norm}; "
                "it must be finite and > 0 (choose another prior for layers that start at zero)"
            )
    return (norms[0] / norms) ** 2 if len(layers) else np.ones(0)


def uniform(layers: Sequence[LayerSpec], norms: np.ndarray | None = None) -> np.ndarray:
    """All layers alike: the first step is layer-wise top-k."""
    return np.ones(len(layers))


PRIORS: dict[str, Callable[[Sequence[LayerSpec], np.ndarray | None], np.ndarray]] = {
    "paper": paper,
    "weight_norm": weight_norm,
    "uniform": uniform,
}
