"""Tests in folders named with_ranks run inside horovodrun jobs only: see tests/jobs.py."""

import os

if "HOROVOD_RANK" not in os.environ:
    collect_ignore_glob = ["*/with_ranks/*"]
