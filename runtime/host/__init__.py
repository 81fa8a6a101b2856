"""Execution on the host."""
