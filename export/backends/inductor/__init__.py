"""Bundles of segments that PyTorch compiled ahead of time."""
