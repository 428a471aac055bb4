"""Which tensors the public half of `mixture` has, and of what shapes. No torch: who verifies a release needs this."""

from __future__ import annotations

from collections.abc import Mapping

LEADING = 64  # components that groups and cells are found in
MOST_CLUSTERS = 10_000
PRIOR = ("prior_count", "prior_total", "prior_square")
TENSORS = ("mean", "axes", "variances", "scale", "cells", *PRIOR, "clusters", "non_negative")


def malformed(shapes: Mapping[str, tuple[int, ...]], size: int) -> str:
    """What is wrong with the shapes of a procedure's tensors, for features of so many numbers; empty: nothing."""
    if shapes.keys() != set(TENSORS):
        return f"expected the tensors {', '.join(TENSORS)}"
    kept, cells = shapes["axes"][:1], shapes["cells"]
    groups, labels = max(1, *cells[:1]), shapes["prior_count"][:1]
    wide = shapes["prior_square"][:1]
    expected = {
        "clusters": (),
        "non_negative": (),
        "mean": (size,),
        "axes": (*kept, size),
        "variances": kept,
        "scale": kept,
        "cells": (*cells[:1], min(LEADING, *kept)),
        "prior_count": (*labels, groups),
        "prior_total": (*labels, groups, *wide),
        "prior_square": (*wide, *wide),
    }
    wrong = [name for name, shape in expected.items() if shapes[name] != shape]
    if not wrong and not kept[0] <= wide[0]:
        wrong = ["prior_square"]
    return f"tensors of the wrong shape: {', '.join(wrong)}" if wrong else ""
