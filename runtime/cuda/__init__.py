"""Execution on a CUDA device."""
