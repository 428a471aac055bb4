"""The words of the data set card: all of it but the numbers, and what is the owner's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NO_DESCRIPTION = "No description was given."
ROWS_ARE = """\
The rows are P(φ1(S)): images S, seen by the public featurizer φ1
(`{arch}` up to `{hook}`), changed by a poisoning function P that is not published. Neither are the images."""
DRAWN_ROWS_ARE = """\
The rows look like the features that the public featurizer φ1
(`{arch}` up to `{hook}`) makes of private images S, and belong to no image. Neither the images nor the statistics that
rows are drawn from are published. Train on the rows, and use what you train on real images of these classes. Beside
real rows of other classes they mislead a classifier: put those through the same procedure first
(`dpf-release featurize --draw`)."""
CARD = """\
---
pretty_name: {name}
license: {licence}
task_categories:
- {category}
tags:
- image-features
- privacy
- deep-poisoning-function
- dpf-release
---

# {release.name} {release.version}

{description}

A feature bank in the place of an image data set. {rows_are}

{statement}

| | |
|---|---|
| task | {task} |
| {names_label} | {names} |
| rows | {rows} |
| a row | {shape}, float16 |
| images for φ1 | RGB, {size} px, mean {mean}, std {std} |
| licence | {release.licence} |
{scores}

## Use

```python
from dpf_release import Release

release = Release.open(".")               # checks every file against manifest.json
bank = release.bank("train")              # a torch data set: (C, H, W) features, target
loader = bank.loader(batch_size=256, shuffle=True)
phi_1, phi_2 = release.featurizer(), release.classifier()
features_of_mine = phi_1(release.preprocess(my_images))
```

`sha256sum -c SHA256SUMS` checks the files without any of our code. `features/*/*.h5` open with plain `h5py`.
{retractions}
## What is promised, and what is not

Claims made: **{claims_made}**.
{claims}
{attacks}
{protection} A release cannot be
recalled: who has a copy keeps it. A patent application, US 2021/0141926, describes this family of methods.
{accepted_risk}{second_function}"""

EMPIRICAL = "The protection is empirical: the method (Guo et al., arXiv 1912.06895) gives no formal guarantee."
# With a bound. Nowhere does (ε, δ) stand without what it is of, for which unit, and under which condition.
PRIVACY = """\
### Privacy bound

{text}

The numbers are in `manifest.json`, under `privacy`; docs/privacy.md of dpf-release shows how to compute ε from them.

What is claimed beyond this bound rests on the attacks that were tried; it is not proven."""
BOUND = """\
{what} differentially private for {unit}, with ε = {epsilon} and δ = {delta}: whether {unit} was among the private
images or not changes what can be found here by no more than that. The condition: as its owner states, φ1 was never
trained on these images, and φ2 was trained on the drawn rows alone.{several}
"""
SEVERAL = {"image": " Who is in several different images has this bound for each, not for all together.", "person": ""}
PARTS, WHOLE = "Rows, φ1 and φ2 are", "The whole release is"
BOUND_OF_STEP = """\
The step that made the rows is (ε, δ)-private for fixed networks. The networks were trained on these images without a
bound, so this release has none. (Of the step: ε = {epsilon} and δ = {delta} for {unit}.)
"""
UNITS = {"image": "one image with all its copies", "person": "one person with all their images"}
SEVERAL_FITS = """\
It is one of {fits} such fits of these images that are published; of all of them together ε is {epsilon}.
"""
NOT_COVERED = "Not covered, although computed from the images: {listed}.\n"

CLAIMS: dict[str, str] = {
    "reconstruction": "that no picture can be reconstructed",
    "linkage": "that someone who holds a picture cannot tell whether it is in here",
    "attribute": "that no attribute of a person can be read from a row",
    "bound": "that what is published tells little of whether any one image (or person) is in here; below, how little",
}
CLAIMED, NOT_CLAIMED = "- claimed (`{name}`{of}): {claim}", "- not claimed (`{name}`): {claim}"
OF_ATTRIBUTE, NO_CLAIM = ", of `{attribute}`", "none"

ATTACKS_KEPT = """\
Attacks were run on this bank where a claim rests on them. Their numbers are not published: no privacy bound covers what
is measured on the images. That the claims passed is the owner's word.
"""
NO_ATTACKS = "Attacks measured: **none**; no attack battery was run on this bank.\n"
ATTACKS = """\
Attacks measured: those of profile **{profile}**, {bank}. All numbers are in `{file}`.

| attack | speaks against | without the bank | attack | unpoisoned rows | leakage | re-identified | power | verdict |
|---|---|---|---|---|---|---|---|---|
{rows}

Each attack is compared with what someone without the bank reaches and with the best that is reached on unpoisoned
rows: leakage 0 is the one, 1 the other, not defined where they are too near (SSIM after a colour fit; of linkage, the
share that is found). Limits that a claim had to stay below: {limits}.
Re-identified: the share of rows, or of pictures, whose own is picked among up to 200 of the class. In brackets, 95 %
intervals. An attack without power does not even break the weak functions that it must break: its failure here proves
nothing.
"""
THIS_BANK = "on exactly this bank"
BANK_BEFORE = "on this bank as it was before {count} rows were dropped; all other rows are as they were then"
POWER = {True: "yes", False: "no", None: "not tried"}
NOT_APPLICABLE, NOT_RUN = "not applicable", "not run"
NOT_DEFINED, NOT_MEASURED = "not defined", "not measured"
NOT_GATED, NO_LIMIT = "none: reported only", "none"
AMONG, LIMIT = "{share}, of {count}", ", limit {limit:.1%}"

ACCEPTED_RISK = """
## A risk that was accepted

The owner wanted to make claims that are not borne out, and published without them. What speaks against them:

{objections}

The owner's reason: {reason}
"""

SECOND_FUNCTION = """
## A second function

Of the same images another release was made before, with another poisoning function. Two views of one image help an
attacker: what one hides, the other may show. The owner's reason: {reason}
"""

NAMES = {"classification": "classes", "regression": "targets"}
IN_UNIT, CUT_SHORT = ", in {unit}", " ... (all in model/model.json)"
CATEGORIES = {"classification": "image-classification", "regression": "other"}
SCORES = {"top1": ("top-1", "{:.2%}"), "mae": ("mean absolute error", "{:.3g} {unit}")}

RETRACTIONS = """
## Retracted

Rows that an earlier version has are not in this one: {rows}. {others} Comparing two versions shows which rows were
retracted{shown}. Who has a copy of an earlier version still has them.
"""
DRAWN_AGAIN = """
## Retracted

Images were retracted since {versions}. The rows here were drawn anew, from statistics fitted without these images;
they are other rows. Who has a copy of an earlier version still has what was drawn with them.
"""
RETRACTED_SINCE = "{count} retracted since {version}"
DROPPED = (
    "All other rows are, bit for bit, those of {base}; rows were only dropped, and what attacks on {base} showed, "
    "where they were run, holds for this version."
)
REBUILT = (
    "{count} rows to which a retracted image had contributed are made of others now; the rest are, bit for bit, those "
    "of {base}. The rebuilt rows want a new attack run: what attacks on {base} showed does not hold for them."
)
REBUILT_TOO = ", and which were rebuilt"
ANEW = "Its bank was written anew: what attacks on an earlier version showed does not hold for this one."


def score_rows(scores: Mapping[str, Any], unit: str) -> list[tuple[str, str]]:
    """What φ2 scores on clean and on poisoned rows; `test` is not released, and `val` chose the epochs."""
    rows = [
        (
            f"φ2 on {split}: {label}, clean and poisoned",
            f"{form.format(task[f'{key}_clean'], unit=unit)}, {form.format(task[f'{key}_poisoned'], unit=unit)}",
        )
        for split, task in scores.items()
        for key, (label, form) in SCORES.items()
        if f"{key}_clean" in task
    ]
    return rows or [("φ2 on clean and poisoned rows", "not measured")]


def fixed_card_text() -> str:
    """All that the words of a card are made of, but for what is the owner's: what stands above."""
    above = [value for name, value in globals().items() if name.isupper()]
    texts = [str([*value.values()] if isinstance(value, dict) else value) for value in above]
    return "\n".join([*texts, str(score_rows({}, ""))])
