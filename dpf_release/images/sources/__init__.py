"""TODO images.sources."""
