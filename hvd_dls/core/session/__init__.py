"""One model on one rank: its plan, a step in progress, what stays, what is saved, what is told.

Imports ``wire``, ``selection`` and ``balancing``; none of them imports this.
"""
