"""Logs of what compression does, and what is made of them: JSON lines, TensorBoard, a page.

Knows no framework and no Horovod.
"""

from hvd_dls.insight.log import Log, make_log

__all__ = ["Log", "make_log"]
