"""Tests in folders named with_... run inside horovodrun jobs only: see tests/jobs.py."""

import os

if not {"HOROVOD_RANK", "OMPI_COMM_WORLD_RANK"} & set(os.environ):  # Gloo, MPI
    collect_ignore_glob = ["*/with_*", "*/with_*/*"]
