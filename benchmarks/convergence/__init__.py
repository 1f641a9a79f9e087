"""Accuracy of sparse training beside dense training.

Modules, each importing only those before it:
    data, models, tasks: What is trained.
    settings, runs: How it is trained, and which runs there are.
    simulation: The workers of a job, in one process.
    training: One run.
    sweep: All runs that are missing, in parallel processes.
    results: What runs have left, grouped by what they are of.
    tables, pictures, times: The parts of the page.
    report: The page, docs/convergence.md.
"""
