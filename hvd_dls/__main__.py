"""``python -m hvd_dls``: the same as the command ``hvd-dls``."""

import sys

from hvd_dls.cli.main import main

sys.exit(main())
