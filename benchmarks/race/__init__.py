"""Whole trainings over slow links, all methods in turns: time to a target loss."""
