"""Clips that are made beside the live sessions, and their records."""
