"""What the compressors of all frameworks share: options, models, agreement of ranks, states.

Imports ``core`` and Horovod's process sets, no framework.
"""

from hvd_dls.adapter.binding import BaseBinding
from hvd_dls.adapter.compressor import BaseCompressor, InstanceOrDefault, refuse_number
from hvd_dls.adapter.watching import on_the_watch
from hvd_dls.adapter.world import World, epoch, is_elastic

__all__ = [
    "BaseBinding",
    "BaseCompressor",
    "InstanceOrDefault",
    "World",
    "epoch",
    "is_elastic",
    "on_the_watch",
    "refuse_number",
]
