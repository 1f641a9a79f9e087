"""Compares what ``hvd-dls advise`` says with trainings over links of several rates.

Modules:
    models: Models and steps, as users give them to ``hvd-dls advise --model``.
    training: A plain training with each candidate in turn, on each rank.
    comparing: Predictions beside measurements.
    __main__: Makes hosts, runs the jobs, shows tables.
"""
