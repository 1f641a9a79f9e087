"""What several benchmarks share.

Modules:
    command_line: Options that most benchmarks have.
    reporting: Tables, files of figures, pictures.
    paths: Where this repository is.
    internals: What benchmarks use of hvd_dls beyond its public interface.
    shapes: Parameter shapes of well-known models.
    noise: Random numbers with light and heavy tails.
    synthetic_model: A torch model that consists of gradients only.
    stopwatch: Where the time of a step goes.
"""
