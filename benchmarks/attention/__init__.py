"""Attention kernels: speed against dense attention, and quality."""
