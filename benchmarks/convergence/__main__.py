"""The command line: ``python -m benchmarks.convergence``."""

import sys

from benchmarks.convergence.sweep import main

if __name__ == "__main__":
    sys.exit(main())
