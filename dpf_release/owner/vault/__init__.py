"""TODO owner.vault."""
