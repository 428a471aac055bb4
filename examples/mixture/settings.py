"""What the experiments of this folder have in common."""

from __future__ import annotations

from pathlib import Path

MEASUREMENTS = Path(__file__).parents[2] / "docs" / "measurements"
DELTA = 4e-6  # below 1 / (10 · 22,500 images)
FUNCTIONS = {
    "epsilon 1": f"mixture:epsilon=1,delta={DELTA}",
    "epsilon 4": f"mixture:epsilon=4,delta={DELTA}",
    "no bound, 8 groups": "mixture:epsilon=inf,groups=8",
}
