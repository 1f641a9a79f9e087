"""Checkpoints of all ranks on disk: parts, complete sets of them, other numbers of ranks.

Knows files and NumPy, no framework and no Horovod.
"""
