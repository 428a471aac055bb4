"""What an attack run measured, as JSON: in the vault, and without a picture in the release. No torch."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from dpf_release.core.bounded_json import SEEN, Record, Sha256, read_json
from dpf_release.errors import VerificationError

Claim = Literal["reconstruction", "linkage", "attribute", "bound"]
Verdict = Literal["pass", "fail", "inconclusive", "reported"]
ProfileName = Literal["quick", "standard", "full"]
PROFILE_ORDER: tuple[ProfileName, ...] = ("quick", "standard", "full")
# Of U2 and U3: what the bank adds to the best that a user has without it, and what clean rows add; for each m one.
GAIN, GAIN_OF_CLEAN = "gain over the best without the bank", "gain of clean rows over the best without the bank"
# A report may be a stranger's: no more of anything than attacks make.
Text = Annotated[str, Field(max_length=500, pattern=SEEN)]
Short = Annotated[str, Field(max_length=100, pattern=SEEN)]
Few = Field(max_length=200)
DECIMALS = 4  # of public numbers
SCORER = 3  # raised whenever the same answers of attacks would be scored otherwise


class Interval(Record):
    """A mean over images, with its 95 % interval."""

    value: float
    low: float
    high: float


Intervals = Annotated[dict[Short, Interval], Few]


class Way(Record):
    """One decoder, probe or way of looking of an attack: means over images of `affine_ssim`, `l1`, `auc`, ..."""

    measures: Intervals
    leakage: Interval | None = None


class Power(Record):
    """Whether the attack breaks what it must break, or its result proves nothing.

    By weak function: what the attack's best way got out of it, and what another attack did that it must surpass.
    """

    passed: bool | None  # None: it has nothing that it could be tried on
    planted: Intervals = {}
    surpassed: Intervals = {}


class AttackResult(Record):
    """One attack on one bank."""

    code: Short
    title: Short
    version: int
    claim: Claim | None
    granted: Short
    rows: int
    images: int
    seconds: float | None = None  # not in a release, where it would tell of the owner's machine
    ways: Annotated[dict[Short, Way], Few]
    baseline: float | None  # by someone without the bank (affine-fit SSIM; chance; from the label alone)
    ceiling: float | None  # the best that any attack reaches on the unpoisoned rows
    # (attack - baseline) / (ceiling - baseline) of its strongest way; None: they are too near.
    leakage: Interval | None
    # Share of rows (of pictures, for linkage) matched with their own, the highest of any way; None: not measured, or
    # among too few. Of how many it was sought, and what it was held against: more where rows are made of several.
    re_identification: Interval | None
    among: int
    re_identification_limit: float | None = None
    beside: Sha256 | None = None  # digest of the index of the other release that it was run with (A9)
    power: Power
    verdict: Verdict
    reasons: Annotated[tuple[Text, ...], Few] = ()  # for a verdict that is not `pass`
    series: Annotated[dict[Short, Intervals], Few] = {}
    exceeds_bound: bool = False  # whether it got past what the privacy bound of the rows allows any attack

    def smallest_above(self, series: str, limit: float) -> int | None:
        """The smallest number of a series at which the leakage is above the limit; None: at no one that was tried."""
        values = self.series.get(series, {})
        return min((int(number) for number, found in values.items() if found.value > limit), default=None)


class Utility(Record):
    """What a downstream user can do with the bank.

    Means over images with their 95 % intervals; of U2 and U3 an image's score is a mean over seeds.
    """

    measures: Intervals
    best: Annotated[dict[Short, Short], Few] = {}  # by `m = 10`, or empty for none: the best without the bank

    @property
    def ordered(self) -> dict[str, Interval]:
        """The measures, m = 10 before m = 100."""
        return dict(sorted(self.measures.items(), key=lambda item: re.sub(r"\d+", lambda m: m[0].zfill(9), item[0])))


class AttackReport(Record):
    """`attack.json`; in a release it is what `public_report` leaves of it."""

    format: Literal["dpf-release-attacks"] = "dpf-release-attacks"
    version: Literal[1] = 1
    index_sha256: Sha256  # of the `features/index.json` of the bank that was attacked, which has its shards' digests
    featurizer_sha256: Sha256
    public_images_sha256: Sha256 | None = None  # Q, by names and file times; not in a release
    profile: ProfileName
    scorer: int = SCORER
    seed: int
    function: Short  # its name; empty in a release
    attribute: Short | None = None  # of which the claim `attribute` is
    limits: Annotated[dict[Short, float], Few] = {}  # of `[gate]`, under which the verdicts were given
    not_applicable: Annotated[dict[Short, Text], Few] = {}  # by attack, what the project lacks; not in a release
    not_run: Annotated[tuple[Short, ...], Few] = ()  # attacks of the profile that were not run, or not yet
    claims_not_made: Annotated[tuple[Claim, ...], Few] | None = None  # by the release that it is in; None in the vault
    dropped_since: Annotated[int, Field(ge=0)] = 0  # rows that the release no longer has; all others are as they were
    not_covered: Annotated[tuple[Text, ...], Few] = ()  # by the privacy bound of the release that it is in
    baselines: Intervals = {}
    references: Intervals = {}
    attacks: Annotated[tuple[AttackResult, ...], Few] = ()
    utility: Annotated[dict[Short, Utility], Few] = {}

    @property
    def gains(self) -> dict[str, tuple[Interval, Interval, str]]:
        """By m own images: what the bank adds to the best without it, what clean rows add, and which that best is."""
        found = {}
        for of in (self.utility[code] for code in ("U2", "U3") if code in self.utility):
            for m, best in of.best.items():
                bank, clean = (of.measures.get(", ".join(filter(None, (gain, m)))) for gain in (GAIN, GAIN_OF_CLEAN))
                if bank and clean:
                    found[m] = bank, clean, best
        return found

    @property
    def adds_nothing(self) -> bool | None:
        """Whether the bank is nowhere better than what a user has without it. None: not measured."""
        return all(bank.low <= 0 for bank, _, _ in self.gains.values()) if self.gains else None

    def as_json(self) -> str:
        """One object, its keys sorted: the same numbers give the same text."""
        return json.dumps(self.model_dump(mode="json"), indent=2, sort_keys=True, allow_nan=False)


def public_report(report: AttackReport) -> AttackReport:
    """What of a report may be public: its numbers, of four decimals, and what the battery's own code says of them.

    Not the function's name, why an attack does not apply (the owner's words may be in either), how long anything took,
    and what Q's files are like on the owner's disk. More decimals would tell of single images, and nothing true of all.
    """
    tree = _rounded(report.model_dump(mode="json"))
    tree |= {"function": "", "public_images_sha256": None}
    tree["not_applicable"] = dict.fromkeys(tree["not_applicable"], "")
    tree["attacks"] = [attack | {"seconds": None} for attack in tree["attacks"]]
    return AttackReport.model_validate(tree)


def without_sizes(report: AttackReport) -> AttackReport:
    """A report whose counts of rows and images do not tell how many the data set has: of one digit, rounded down."""
    attacks = [
        attack.model_copy(
            update={
                "rows": _one_digit(attack.rows),
                "among": _one_digit(attack.among),
                "reasons": tuple(map(text_without_sizes, attack.reasons)),
            }
        )
        for attack in report.attacks
    ]
    return report.model_copy(update={"attacks": tuple(attacks)})


def text_without_sizes(text: str) -> str:
    """A reason for a verdict, where it counts rows."""
    return re.sub(r"\b\d+(?= rows\b)", lambda found: str(_one_digit(int(found[0]))), text)


def _one_digit(count: int) -> int:
    unit = 10 ** (len(str(count)) - 1)
    return count // unit * unit


def _rounded(tree: Any) -> Any:
    if isinstance(tree, float):
        return round(tree, DECIMALS) + 0.0  # no -0.0
    if isinstance(tree, dict):
        return {key: _rounded(value) for key, value in tree.items()}
    return [_rounded(value) for value in tree] if isinstance(tree, list) else tree


def read_attack_report(path: Path) -> AttackReport:
    """The report of a release; `VerificationError` where it is no file, too large, or not a report of format 1."""
    try:
        return read_json(path, AttackReport)
    except (OSError, ValueError) as error:
        raise VerificationError(f"{path.name} is not a report of attacks of format 1: {error}") from error
