"""Poisoning functions P: features → features of the same shape, by name, alone or in a chain.

A function first makes a *plan* for a bank (which rows it draws on, from the vault's secret), then is *applied* to
rows by number. Row-wise functions have an empty plan.
"""

from dpf_release.poisoning import (  # each registers itself
    class_gaussian as class_gaussian,
)
from dpf_release.poisoning import (
    deep as deep,
)
from dpf_release.poisoning import (
    recombine as recombine,
)
from dpf_release.poisoning import (
    stationary as stationary,
)
