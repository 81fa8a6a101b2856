"""A live session: what is said, the clock of the screen, from frames to access units. Knows no transport."""
