"""Targets and variants (TOML, package data). Built bundles go to `built/`, which is not part of the package."""
