"""How dense a step is: whole gradients at first, then halved until the density is reached."""

from __future__ import annotations

from hvd_dls.config import DLSConfig


def density_at(config: DLSConfig, step: int) -> float:
    """Density of a step, counted from 0 behind the dense ones.

    The warm-up of DGC (3.3) as stairs: from ``warmup_density`` each stair is half as high, all are
    equally long, and the last ends at ``warmup_steps``.  Stairs, because payloads keep their length
    on each; halves, because they are exact on every machine.
    """
    stairs = _stairs(config)
    if step >= config.warmup_steps or not stairs:
        return config.density
    return stairs[step * len(stairs) // config.warmup_steps]


def _stairs(config: DLSConfig) -> list[float]:
    stairs = []
    density = config.warmup_density
    while density > config.density:
        stairs.append(density)
        density /= 2
    return stairs
