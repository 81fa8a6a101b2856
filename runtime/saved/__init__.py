"""Sessions in files: what is written, and how a lane of the scheduler becomes that and comes back."""
