"""Bytes and time that an entry costs on the wire: see ``__main__``."""
