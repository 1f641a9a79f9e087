"""One page of HTML made of logs, which needs nothing from outside.

Pictures are SVG, made here: so they follow the reader's light or dark colours, and a pointer over a
line tells its name.
"""

from hvd_dls.insight.page.document import page_of

__all__ = ["page_of"]
