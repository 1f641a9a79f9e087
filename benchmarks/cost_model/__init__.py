"""A formula for the time of a step, and what it predicts: see ``__main__``."""
