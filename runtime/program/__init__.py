"""A rollout's step as a program of launches and engine calls, and the buffers that it works on."""
