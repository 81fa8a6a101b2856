"""What is known before anything is built: memory, and the floor of every chunk's time."""
