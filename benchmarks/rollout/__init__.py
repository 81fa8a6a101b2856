"""Whole rollouts at full size: the ladder from plain PyTorch to the runtime."""
