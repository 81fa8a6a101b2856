"""Quantization: formats, what they cost, calibration, and which layers are left out."""
