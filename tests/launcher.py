"""horovodrun, but for one question that it asks before each job: what Horovod was built with.

To answer it, horovodrun imports TensorFlow in a process of its own, which takes more processor time
than many of these jobs do.  The answer is the same for all of them; where a job needs what is not
there, its ranks say so.  The jobs on many hosts, and those that benchmarks and examples/demo.py
start by themselves, go through the command as it is.
"""

import sys
from unittest import mock

from horovod.runner import launch

if __name__ == "__main__":
    built = dict.fromkeys(("gloo_built", "mpi_built"), lambda verbose: True)
    with mock.patch.multiple(launch, **built):
        sys.exit(launch.run_commandline())
