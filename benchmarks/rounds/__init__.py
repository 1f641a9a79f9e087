"""Measures several ways to exchange the same gradients in one job, in interleaved rounds."""
