"""What a release says of its privacy bound: on what evidence it is claimed, and what it does not cover."""

from __future__ import annotations

from dpf_release.core.privacy import Mechanism
from dpf_release.owner.privacy import Fit, chosen_among, without_bound
from dpf_release.owner.project import Project
from dpf_release.publish.gate import Passage

NETWORKS_SAW = (
    "φ1 or φ2 was trained on these images without a bound. Take a φ1 that never saw them ([network] never_saw_private, "
    'or train_on = "public") and classifier = "from-bank"'
)
WITHOUT_BOUND = "a release of these images was made without a bound: {release}"


def against_bound(project: Project, mechanism: Mechanism | None) -> list[str] | None:
    """What speaks against the claim `bound` by the ledger; nothing: it holds. None: there is no mechanism."""
    if mechanism is None:
        return None
    if mechanism.networks_saw_images:
        return [NETWORKS_SAW]
    return [WITHOUT_BOUND.format(release=release) for release in without_bound(project.vault)[:1]]


def not_covered(
    project: Project, fit: Fit, mechanism: Mechanism, passage: Passage, scores_shown: bool
) -> tuple[str, ...]:
    """What else was computed from the images and is published, a phrase each.

    Args:
        project: the owner's.
        fit: that the release is made of.
        mechanism: what is said of it.
        passage: what the gate said: reports and objections are measured on the images, and so are claims that passed.
        scores_shown: whether the card has what φ2 scores on the images.
    """
    numbers = [where for where, there in (("in reports/", passage.report), ("on the card", scores_shown)) if there]
    if passage.objections and "on the card" not in numbers:
        numbers.append("on the card")
    among = chosen_among(project.vault, fit)
    others = [claim for claim in passage.claims.made if claim != "bound"]
    saw = mechanism.networks_saw_images
    found = {
        "the networks φ1 and φ2, which were trained on these images": saw,
        f"the measured numbers {' and '.join(numbers)}": bool(numbers),
        f"that attacks bear out the claims made: {', '.join(others)}": bool(others),
        f"which fit is published: it was chosen among {among} fits": among > 1,
        "other releases of these images that were made without a bound": not saw and bool(without_bound(project.vault)),
    }
    return tuple(phrase for phrase, holds in found.items() if holds)
