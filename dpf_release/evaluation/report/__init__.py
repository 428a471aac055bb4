"""TODO evaluation.report."""
