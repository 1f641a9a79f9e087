"""Whether sparse training reaches the accuracy of dense training: see ``__main__``."""
