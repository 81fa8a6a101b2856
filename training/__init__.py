"""Trains the tiny model on procedural captioned video: `python -m training run --stage ...`."""
