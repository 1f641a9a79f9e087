"""What travels between ranks, byte by byte: buckets, payloads, the handshake.

Imports ``balancing`` (layers, the sketch) and ``core.jit`` only.
"""
