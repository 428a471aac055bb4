"""Poisoning functions P: features → features of the same shape, by name, alone or in a chain.

A function first makes a *plan* for a bank (which rows it draws on, from the vault's secret), then is *applied* to
rows by number. Row-wise functions have an empty plan. `FUNCTIONS` is the registry; a function of your own is named
`package.module.Class` in `dpf.toml`, or registered with `@register("name")`.
"""

from dpf_release.models.functions.chain import Chain, build_chain
from dpf_release.models.functions.class_gaussian import ClassGaussian
from dpf_release.models.functions.deep import DeepPoisoningFunction
from dpf_release.models.functions.interface import (
    FUNCTIONS,
    FeatureSpec,
    Plan,
    PoisonedRows,
    PoisoningFunction,
    RowSource,
    register,
)
from dpf_release.models.functions.recombine import Recombine
from dpf_release.models.functions.stationary import GaussianFilter, GaussianNoise, Identity, MeanFilter

__all__ = [
    "FUNCTIONS",
    "Chain",
    "ClassGaussian",
    "DeepPoisoningFunction",
    "FeatureSpec",
    "GaussianFilter",
    "GaussianNoise",
    "Identity",
    "MeanFilter",
    "Plan",
    "PoisonedRows",
    "PoisoningFunction",
    "Recombine",
    "RowSource",
    "build_chain",
    "register",
]
