"""The clips that the tiny model learns from: drawn, split, and as latents."""
