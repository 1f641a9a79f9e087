"""Time of finding the largest entries of a layer: see ``__main__``."""
