"""Comparison of bundles with the reference model, with other bundles, and of precisions with one another."""
