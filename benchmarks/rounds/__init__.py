"""Measures several methods to exchange gradients in one job, in interleaved rounds.

In each round every method has a turn of some steps, in random order, so that whatever else the
machine does hits all methods alike. ``python -m benchmarks.rounds`` is the program of each rank;
the benchmarks ``exchange`` and ``network`` start it and sum its figures up.

Modules:
    options: Command line options, and how the benchmarks pass them on to the job.
    methods: The methods, and one step of each.
    __main__: The job: warm-up, rounds, profile.
    summary: What the benchmarks make of a job's figures: quartiles, ratios, tables.
"""
