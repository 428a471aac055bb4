"""TODO publish.leaks."""
