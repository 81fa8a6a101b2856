"""Measuring commands. Results are committed under `results/`, each with its machine and date."""
