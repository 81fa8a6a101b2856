"""Files by name: references to a model hub, the known public checkpoints, and bundles that travel."""
