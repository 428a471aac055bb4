"""TODO attacks.toolkit."""
