"""Networks: Φ and where it is cut, reconstructors ψ, poisoning functions P."""

from __future__ import annotations
