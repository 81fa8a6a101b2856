"""What HTTP requests pass and reach."""
