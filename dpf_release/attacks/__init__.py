"""The attackers: what they hold (`view`), what they answer (`interface`), and one file for each attack.

Nothing here imports the vault, the private images or P; a test holds that.
"""

from dpf_release.attacks import (
    attribute,
    deep_tap,
    known_pairs,
    leaked_vault,
    linkage,
    membership,
    optimisation,
    outputs,
    shadow,
    straw_men,
)
from dpf_release.attacks.interface import (
    ATTACKS,
    Attack,
    Attributes,
    Likeness,
    Links,
    Reconstructions,
    Result,
    register,
    registered,
)
from dpf_release.attacks.view import (
    Budget,
    Candidates,
    HeldPictures,
    HeldRows,
    KnownPairs,
    LabelledRows,
    LeakedVault,
    ReleaseView,
    TwoReleases,
)

__all__ = [
    "ATTACKS",
    "Attack",
    "Attributes",
    "Budget",
    "Candidates",
    "HeldPictures",
    "HeldRows",
    "KnownPairs",
    "LabelledRows",
    "LeakedVault",
    "Likeness",
    "Links",
    "Reconstructions",
    "ReleaseView",
    "Result",
    "TwoReleases",
    "deep_tap",
    "optimisation",
    "outputs",
    "known_pairs",
    "leaked_vault",
    "register",
    "attribute",
    "linkage",
    "membership",
    "registered",
    "shadow",
    "straw_men",
]
