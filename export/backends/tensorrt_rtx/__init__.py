"""Bundles with TensorRT-RTX engines."""
