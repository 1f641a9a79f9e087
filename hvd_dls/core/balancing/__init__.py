"""The paper: from shapes and sketches to the number of entries that each layer sends.

Pure mathematics.  Imports nothing but NumPy, the options and the errors.
"""
