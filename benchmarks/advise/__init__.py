"""Compares what ``advise`` says with trainings over links of several rates.

Modules:
    models: Models and steps, as users give them to ``hvd-dls advise --model``.
    training: Trainings with each candidate in turn, and advice between them, on each rank.
    comparing: Predictions beside measurements.
    __main__: Makes hosts, runs the jobs, shows tables.
"""
