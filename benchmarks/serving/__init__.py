"""What clients of a server see: `python -m benchmarks.serving`."""
