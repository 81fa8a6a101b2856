"""The kernels under PyTorch, without an engine."""
