"""A long training in which everything happens that does in ordinary life."""
