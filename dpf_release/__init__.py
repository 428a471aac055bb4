"""Publish an image data set as poisoned feature banks, without publishing the images.

A network Φ is cut into a featurizer φ1 and a classifier φ2. S are the private images, Q public ones, T a user's own.
A poisoning function P turns the features φ1(S) into rows that are published; all that could undo it stays in the
vault. A candidate is a bank in the vault, exactly as it would be published.

The packages, from low to high; each imports only from those before it: `errors` (one root, and what each means),
`core`, `bank`, `images`, `models`, `poisoning`, `release`, `attacks`, `owner`, `evaluation`, `publish`, `cli`. Each
package's docstring is its guide.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpf_release.attacks.interface import Attack
    from dpf_release.attacks.interface import register as register_attack
    from dpf_release.bank.dataset import concat
    from dpf_release.bank.reader import FeatureBank
    from dpf_release.errors import (
        BankError,
        ConfigError,
        DPFReleaseError,
        HookError,
        ImageError,
        NotGrantedError,
        RankError,
        RefusedError,
        SigningError,
        StorageError,
        TrainingError,
        VaultError,
        VerificationError,
        WeightsError,
    )
    from dpf_release.evaluation.suite import attack
    from dpf_release.owner.featurize import featurize
    from dpf_release.owner.fit_poison import fit_poison
    from dpf_release.owner.init import init
    from dpf_release.owner.poison import poison
    from dpf_release.owner.privacy import privacy
    from dpf_release.owner.project import Project
    from dpf_release.owner.retract import retract
    from dpf_release.owner.train import train
    from dpf_release.poisoning.interface import PoisoningFunction
    from dpf_release.poisoning.interface import register as register_function
    from dpf_release.publish.audit.audit import audit
    from dpf_release.publish.package import package
    from dpf_release.release.release import Release
    from dpf_release.release.verify import verify

__version__ = "0.1.0"
__all__ = [
    "Attack", "BankError", "ConfigError", "DPFReleaseError", "FeatureBank", "HookError", "ImageError",
    "NotGrantedError", "PoisoningFunction", "Project", "RankError", "RefusedError", "Release", "SigningError",
    "StorageError", "TrainingError", "VaultError", "VerificationError", "WeightsError", "__version__", "attack",
    "audit", "concat", "featurize", "fit_poison", "init", "package", "poison", "privacy", "register_attack",
    "register_function", "retract", "train", "verify",
]  # fmt: skip

# Where each name lies, and under which name there where that is another; all others are errors.
_HOME = {
    "Attack": "attacks.interface",
    "FeatureBank": "bank.reader",
    "PoisoningFunction": "poisoning.interface",
    "Project": "owner.project",
    "Release": "release.release",
    "attack": "evaluation.suite",
    "audit": "publish.audit.audit",
    "concat": "bank.dataset",
    "featurize": "owner.featurize",
    "fit_poison": "owner.fit_poison",
    "init": "owner.init",
    "package": "publish.package",
    "poison": "owner.poison",
    "privacy": "owner.privacy",
    "register_attack": "attacks.interface:register",
    "register_function": "poisoning.interface:register",
    "retract": "owner.retract",
    "train": "owner.train",
    "verify": "release.verify",
}


def __getattr__(name: str) -> Any:
    # torch takes seconds to import: only what is used is loaded, so that `dpf-release --help` answers at once.
    if name not in __all__:
        raise AttributeError(f"module 'dpf_release' has no attribute {name!r}")
    module, _, there = _HOME.get(name, "errors").partition(":")
    return getattr(import_module(f"dpf_release.{module}"), there or name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
