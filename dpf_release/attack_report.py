"""What an attack run measured, as JSON: in the vault, and without a picture in the release. No torch."""

from __future__ import annotations

import json
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Verdict = Literal["pass", "fail", "inconclusive", "reported"]
ProfileName = Literal["quick", "standard", "full"]
PROFILE_ORDER: tuple[ProfileName, ...] = ("quick", "standard", "full")
GAIN = "gain over own images alone"  # of U3; for each m a measure, positive where the bank helps
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Text = Annotated[str, Field(max_length=500)]
Short = Annotated[str, Field(max_length=100)]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Interval(_Record):
    """A mean over images, with its 95 % interval."""

    value: float
    low: float
    high: float


class Way(_Record):
    """One decoder, probe or way of looking of an attack.

    Attributes:
        measures: what was measured, each a mean over images: `affine_ssim`, `l1`, `top1`, `auc`, ...
        leakage: of this way alone.
    """

    measures: dict[Short, Interval]
    leakage: Interval | None = None


class Power(_Record):
    """Whether the attack breaks what it must break, or its result proves nothing.

    Attributes:
        passed: None: it has nothing that it could be tried on.
        planted: weak function → what the attack's best way got out of it.
    """

    passed: bool | None
    planted: dict[Short, Interval] = {}


class AttackResult(_Record):
    """One attack on one bank.

    Attributes:
        baseline: the same measure by someone without the bank (affine-fit SSIM; chance; from the label alone).
        ceiling: the best that any attack reaches on the unpoisoned rows.
        leakage: (attack - baseline) / (ceiling - baseline) of its strongest way; None: they are too near.
        re_identification: share of rows (of pictures, for linkage) matched with their own, by the strongest way;
            None: not measured, or among too few.
        among: of how many the match was sought.
        reasons: for a verdict that is not `pass`.
    """

    code: Short
    title: Short
    version: int
    claim: Literal["reconstruction", "linkage", "attribute"] | None
    granted: Short
    rows: int
    images: int
    seconds: float
    ways: dict[Short, Way]
    baseline: float | None
    ceiling: float | None
    leakage: Interval | None
    re_identification: Interval | None
    among: int
    power: Power
    verdict: Verdict
    reasons: tuple[Text, ...] = ()
    series: dict[Short, dict[Short, Interval]] = {}

    def smallest_above(self, series: str, limit: float) -> int | None:
        """The smallest number of a series at which the leakage is above the limit; None: at no one that was tried."""
        values = self.series.get(series, {})
        return min((int(number) for number, found in values.items() if found.value > limit), default=None)


class Utility(_Record):
    """What a downstream user can do with the bank: U1, U2, U3.

    Attributes:
        measures: of U1 means over images with their 95 % intervals; of U2 and U3 means over seeds, with the lowest and
            the highest seed.
    """

    measures: dict[Short, Interval]


class AttackReport(_Record):
    """`attack.json`.

    Attributes:
        index_sha256: of the bank that was attacked: its `features/index.json`, which lists the digests of its shards.
        profile: how hard.
        attribute: of which the claim `attribute` is.
    """

    format: Literal["dpf-release-attacks"] = "dpf-release-attacks"
    version: Literal[1] = 1
    index_sha256: Sha256
    featurizer_sha256: Sha256
    public_images_sha256: Sha256
    profile: ProfileName
    seed: int
    function: Short
    attribute: Short | None = None
    baselines: dict[Short, Interval] = {}
    references: dict[Short, Interval] = {}
    attacks: tuple[AttackResult, ...] = ()
    utility: dict[Short, Utility] = {}

    @property
    def no_better_than_own(self) -> bool | None:
        """Whether the bank adds nothing to own images: for no m does it help with every seed. None: not measured."""
        measures = self.utility["U3"].measures if "U3" in self.utility else {}
        gains = [found for name, found in measures.items() if name.startswith(GAIN)]
        return all(gain.low <= 0 for gain in gains) if gains else None

    def as_json(self) -> str:
        """One object, its keys sorted: the same numbers give the same text."""
        return json.dumps(self.model_dump(mode="json"), indent=2, sort_keys=True, allow_nan=False)
