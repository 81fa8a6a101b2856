"""Quality of the tiny model's clips."""
