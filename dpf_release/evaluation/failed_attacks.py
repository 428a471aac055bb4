"""What failed once on a bank speaks against its claims whatever is run later: no seed is drawn until one passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import BaseModel, ConfigDict, ValidationError

from dpf_release.attacks.interface import ATTACKS
from dpf_release.errors import VaultError
from dpf_release.owner.vault.vault import Vault
from dpf_release.release.attack_report import SCORER, AttackReport, Claim, ProfileName

FAILURES = "failed.json"
LIMITS_OF: dict[Claim, tuple[str, ...]] = {
    "reconstruction": ("leakage", "re_identification"),
    "linkage": ("top1", "auc", "tpr"),
    "attribute": ("attribute",),
    "bound": (),  # what a bound allows is not the owner's to set
}


class Failure(BaseModel):
    """An attack that got past a limit of `[gate]`, as they were then; the reasons say what it got."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    index_sha256: str
    profile: ProfileName
    seed: int
    scorer: int
    limits: dict[str, float]
    code: str
    title: str
    version: int
    claim: Claim
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.code} {self.title}, profile {self.profile}, seed {self.seed}: fail, {'; '.join(self.reasons)}"

    def holds(self, limits: Mapping[str, float]) -> bool:
        """Whether today's attack and scorer said so, under the limits of the claim that there are today, or wider."""
        attack = ATTACKS.get(self.code)
        same = self.scorer == SCORER and (attack is None or attack.version == self.version)
        return same and all(self.limits.get(key, 0.0) >= limits[key] for key in LIMITS_OF[self.claim])


def failed_in(report: AttackReport) -> list[Failure]:
    """The failures that a report tells of."""
    shared = report.model_dump(include={"index_sha256", "profile", "seed", "scorer", "limits"})
    own = {"code", "title", "version", "claim", "reasons"}
    return [
        Failure(**shared, **result.model_dump(include=own))
        for result in report.attacks
        if result.verdict == "fail" and result.claim is not None
    ]


def failures(vault: Vault, name: str) -> list[Failure]:
    """All that were noted of a function's candidates; where the file is not one of ours, a `VaultError`."""
    path = vault.reports(name) / FAILURES
    try:
        tree = vault.read_record(path, "attack") if vault.holds(path) else []
        return [Failure.model_validate(entry) for entry in tree]
    except (ValidationError, TypeError) as error:
        raise VaultError(
            f"{path} does not list failed attacks as this version does: {error}. Without it nobody knows what failed; "
            "bring it back, or remove it and run the attacks again."
        ) from error


def note_failures(vault: Vault, name: str, found: Sequence[Failure]) -> None:
    """Adds failures to those that were noted before."""
    known = failures(vault, name)
    if new := [failure for failure in found if failure not in known]:
        path = vault.reports(name) / FAILURES
        vault.write_json(path, [failure.model_dump(mode="json") for failure in [*known, *new]])
