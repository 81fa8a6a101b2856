"""From latents to frames: the decoder of Wan and the tiny autoencoders that may stand in for it."""
