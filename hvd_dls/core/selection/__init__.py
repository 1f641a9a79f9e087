"""One layer, one step: find what to send, settle the step, on the host or on a device.

Imports ``balancing`` (the sketch) and ``core.jit`` only.
"""
