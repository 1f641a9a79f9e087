"""Measures several methods to exchange gradients in one job, in interleaved rounds.

In each round every method has a turn of some steps, in random order, so that whatever else the
machine does hits all methods alike. ``python -m benchmarks.rounds`` is the program of each rank;
the benchmarks ``exchange`` and ``network`` start it and sum its figures up.

Modules:
    options: Command line options, and how the benchmarks pass them on to the job.
    turns: Warm-ups and rounds, for any framework.
    methods: The methods, and one step of each, with torch; ddp: with torch's own DDP.
    __main__: The job with torch: warm-up, rounds, profile.
    tensorflow: The job with TensorFlow: steps of a tape in a tf.function.
    summary: What the benchmarks make of a job's figures: quartiles, ratios, tables.
"""
