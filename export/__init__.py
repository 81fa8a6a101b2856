"""Checkpoint -> ONNX -> engines -> bundle."""
