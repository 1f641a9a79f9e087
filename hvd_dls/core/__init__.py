"""The algorithm, in NumPy: no framework and no Horovod in here."""
