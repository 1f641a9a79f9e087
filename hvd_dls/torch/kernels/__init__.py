"""Passes over a layer as fused GPU kernels, written in Triton: ``find`` and ``settle``.

Imported where there is a gradient on a GPU only, and only if Triton is there (see ``on_device``).
"""
