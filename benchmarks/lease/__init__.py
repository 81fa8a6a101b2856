"""Everything worth knowing from a GPU that is there for a quarter of an hour: `python -m benchmarks.lease`."""
