"""Damage, at random and by the thousand: what is tried must end in what is right or in a clear error.

`make fuzz` runs it for a bounded time and prints the seed; `tests/fuzz/test_fuzz.py` runs a small part of it.
"""
