"""Bundles with TensorRT engines."""
