"""Which tensors say how rows were drawn (`model/procedure.safetensors`), and of what shapes. No torch.

They may be a stranger's: shapes are bounded here before anything is made of them.
"""

from __future__ import annotations

from collections.abc import Mapping

LEADING = 64  # components that groups and cells are found in
MOST_COMPONENTS, MOST_GROUPS, MOST_LABELS, MOST_TARGETS = 4096, 1000, 100_000, 10_000
PRIOR = ("prior_count", "prior_total", "prior_square")
TENSORS = ("mean", "axes", "variances", "scale", "cells", *PRIOR, "clusters", "non_negative")


def malformed(shapes: Mapping[str, tuple[int, ...]], size: int) -> str:
    """What is wrong with the shapes of a procedure's tensors, for features of so many numbers; empty: nothing."""
    if shapes.keys() != set(TENSORS):
        return f"expected the tensors {', '.join(TENSORS)}"
    ranks = {"mean": 1, "axes": 2, "variances": 1, "scale": 1, "cells": 2, "clusters": 0, "non_negative": 0}
    ranks |= {"prior_count": 2, "prior_total": 3, "prior_square": 2}
    wrong = [name for name, rank in ranks.items() if len(shapes[name]) != rank]
    if not wrong:
        kept, cells, labels = shapes["axes"][0], shapes["cells"][0], shapes["prior_count"][0]
        groups, wide = max(1, cells), shapes["prior_square"][0]
        if not (1 <= kept <= MOST_COMPONENTS and groups <= MOST_GROUPS and 1 <= labels <= MOST_LABELS):
            return f"{kept} components, {groups} groups and {labels} labels, which is none or too many"
        if not kept <= wide <= kept + MOST_TARGETS:
            return f"moments of {wide} numbers, expected {kept} and those of the targets"
        expected = {
            "mean": (size,),
            "axes": (kept, size),
            "variances": (kept,),
            "scale": (kept,),
            "cells": (cells, min(LEADING, kept)),
            "prior_count": (labels, groups),
            "prior_total": (labels, groups, wide),
            "prior_square": (wide, wide),
        }
        wrong = [name for name, shape in expected.items() if shapes[name] != shape]
    return f"tensors of the wrong shape: {', '.join(wrong)}" if wrong else ""
