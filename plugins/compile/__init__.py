"""Compiles kernel images, and libraries with the images inside."""
