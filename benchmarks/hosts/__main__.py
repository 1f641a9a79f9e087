"""The command line: ``python -m benchmarks.hosts``."""

import sys

from benchmarks.hosts.cluster import main

if __name__ == "__main__":
    sys.exit(main())
