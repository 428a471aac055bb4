"""The privacy bound of a release: what it is claimed on, what it says of itself, and what no file may tell."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from dpf_release.attacks.interface import registered
from dpf_release.bank.format import read_index
from dpf_release.core.files import sha256_of
from dpf_release.core.privacy import Mechanism, composed, epsilon_of
from dpf_release.errors import RefusedError
from dpf_release.evaluation.failed_attacks import Failure, note_failures
from dpf_release.evaluation.suite import report_file
from dpf_release.owner.config import GateSection
from dpf_release.owner.fit_poison import fit_poison
from dpf_release.owner.measure import measure
from dpf_release.owner.poison import write_candidate
from dpf_release.owner.privacy import PRIVACY_LEDGER
from dpf_release.owner.project import Project
from dpf_release.publish.audit.audit import audit
from dpf_release.publish.card_text import CARD, fixed_card_text
from dpf_release.publish.leaks.text import public_texts
from dpf_release.publish.package import package
from dpf_release.release.attack_report import AttackReport, AttackResult, Interval, Power, Way
from dpf_release.release.contents import verify_deep
from dpf_release.release.manifest import ATTACK_REPORT, Manifest, describe_files, write_manifest
from dpf_release.release.verify import parse_manifest, read_manifest, verify
from in_process import _structure_in_process  # noqa: F401  # for all tests here

CONDITION = "φ1 was never trained on these images, and φ2 was trained on the drawn rows alone"
NO_BOUND = (
    "The step that made the rows is (ε, δ)-private for fixed networks. The networks were trained on these images "
    "without a bound, so this release has none."
)
FOUND = Interval(value=0.52, low=0.49, high=0.55)
REASON = "For a workshop of ten, who signed for it."


def opened(folder: Path, **overrides: Any) -> Project:
    return Project.open(folder / "dpf.toml", {key.replace("__", "."): value for key, value in overrides.items()})


def claiming(folder: Path, **overrides: Any) -> Project:
    return opened(folder, claims__bound=True, **overrides)


def card(folder: Path) -> str:
    text = (folder / "release" / "README.md").read_text(encoding="utf-8")
    return " ".join(text.split())


def manifest_of(folder: Path) -> Manifest:
    manifest = read_manifest(folder / "release")
    assert isinstance(manifest, Manifest)
    return manifest


def result(**changes: Any) -> AttackResult:
    of = next(attack for attack in registered() if attack.claim == "linkage")
    fields: dict[str, Any] = {
        "code": of.code,
        "title": of.title,
        "version": of.version,
        "claim": "linkage",
        "granted": "ReleaseView",
        "rows": 1000,
        "images": 150_000,
        "ways": {"a way": Way(measures={"auc": FOUND})},
        "baseline": 0.5,
        "ceiling": 1.0,
        "leakage": FOUND,
        "re_identification": None,
        "among": 200,
        "power": Power(passed=True),
        "verdict": "pass",
    }
    return AttackResult(**fields | changes)


def put_report(project: Project, *attacks: AttackResult) -> None:
    index = project.vault.candidate("default") / "features" / "index.json"
    report = AttackReport(
        index_sha256=sha256_of(index),
        featurizer_sha256=project.cut.featurizer_sha256,
        profile="standard",
        seed=0,
        function="default",
        limits=GateSection().limits,
        attacks=attacks,
    )
    path = project.vault.reports("default") / report_file("standard")
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    project.vault.write_json(path, report.model_dump(mode="json"))


# --------------------------------------------------------------------------------------------- the claim


def test_the_claim_rests_on_the_ledger_and_wants_no_attack(drawn_folder: Path) -> None:
    manifest = package(claiming(drawn_folder))
    assert manifest.claims.made == ("bound",)
    assert verify_deep(drawn_folder / "release") == []
    assert manifest.privacy is not None
    assert not manifest.privacy.networks_saw_images


def test_a_function_without_a_mechanism_cannot_claim_it_and_does_not_list_it(project_folder: Path) -> None:
    assert package(opened(project_folder)).claims.not_made == ("reconstruction", "linkage", "attribute")
    with pytest.raises(RefusedError, match="bound: the function has no mechanism"):
        package(claiming(project_folder))
    assert "bound" in package(claiming(project_folder), accept_risk=REASON).claims.not_made
    assert "(ε, δ)" not in card(project_folder)


def test_networks_that_saw_the_images_leave_no_bound_and_the_card_says_so_in_these_words(drawn_folder: Path) -> None:
    saw = {"network__never_saw_private": False}
    with pytest.raises(RefusedError, match="bound: φ1 or φ2 was trained on these images without a bound"):
        package(claiming(drawn_folder, **saw))
    manifest = package(opened(drawn_folder, **saw))
    assert manifest.privacy is not None
    assert manifest.privacy.networks_saw_images
    assert manifest.privacy.not_covered[0] == "the networks φ1 and φ2, which were trained on these images"
    assert NO_BOUND in card(drawn_folder)
    assert "differentially private" not in card(drawn_folder)
    package(opened(drawn_folder))  # the control
    assert NO_BOUND not in card(drawn_folder)
    assert CONDITION in card(drawn_folder)


def test_a_release_of_the_same_images_without_a_bound_leaves_none(drawn_folder: Path) -> None:
    fit_poison(opened(drawn_folder, poison__function="class-gaussian"), name="other")
    write_candidate(opened(drawn_folder), "other")
    package(opened(drawn_folder), "other")
    with pytest.raises(RefusedError, match=r"bound: a release .* was made without a bound: shapes 1\.0\.0"):
        package(claiming(drawn_folder, release__version="2.0.0"), second_function=REASON)


@pytest.mark.parametrize(
    "broken",
    [
        {"claim": "bound", "reasons": ("AUC 0.9",)},
        {"reasons": ("with a bound, AUC 0.9 [0.8, 0.95], and the privacy bound allows 0.743: a bug",)},
    ],
    ids=["of the claim", "of linkage, by its reason"],
)
@pytest.mark.parametrize("claimed", [True, False])
def test_where_an_attack_exceeds_the_bound_nothing_is_published_and_no_accepted_risk_helps(
    drawn_folder: Path, broken: dict[str, Any], claimed: bool
) -> None:
    project = opened(drawn_folder, claims__bound=claimed)
    put_report(project, result(verdict="fail", **broken))
    with pytest.raises(RefusedError, match="found more of these images than their privacy bound allows"):
        package(project, accept_risk=REASON)
    assert not (drawn_folder / "release").exists()
    put_report(project, result(verdict="fail", reasons=("AUC 0.7, limit 0.6",)))  # the control: another claim
    package(project, accept_risk=REASON)


def test_what_exceeded_the_bound_once_is_not_forgotten_with_its_report(drawn_folder: Path) -> None:
    project = claiming(drawn_folder)
    put_report(project, found := result(claim="bound", verdict="fail", reasons=("AUC 0.9",)))
    index = sha256_of(project.vault.candidate("default") / "features" / "index.json")
    noted = Failure(
        index_sha256=index,
        profile="standard",
        seed=0,
        scorer=AttackReport.model_fields["scorer"].default,
        limits=GateSection().limits,
        **found.model_dump(include={"code", "title", "version", "claim", "reasons"}),
    )
    note_failures(project.vault, "default", [noted])
    put_report(project, result())
    with pytest.raises(RefusedError, match="no accepted risk helps"):
        package(project, accept_risk=REASON)


# --------------------------------------------------------------------------------------------- what is not covered


def test_the_whole_release_is_said_only_where_nothing_that_was_measured_is_published(drawn_folder: Path) -> None:
    project = claiming(drawn_folder)
    measure(project)
    put_report(project, result())
    manifest = package(project)
    assert manifest.privacy is not None
    assert manifest.privacy.not_covered == ("the measured numbers in reports/ and on the card",)
    assert "Rows, φ1 and φ2 are differentially private" in card(drawn_folder)
    assert "The whole release is" not in card(drawn_folder)
    told = json.loads((drawn_folder / "release" / ATTACK_REPORT).read_text())["not_covered"]
    assert tuple(told) == manifest.privacy.not_covered
    manifest = package(project, without_report=True)
    assert manifest.privacy is not None
    assert manifest.privacy.not_covered == ()
    assert "The whole release is differentially private" in card(drawn_folder)
    assert not (drawn_folder / "release" / ATTACK_REPORT).exists()
    assert "φ2 on val" not in card(drawn_folder)
    assert verify_deep(drawn_folder / "release") == []


def test_claims_that_attacks_bear_out_are_not_covered_and_without_report_they_are_the_owners_word(
    drawn_folder: Path,
) -> None:
    project = claiming(drawn_folder, claims__linkage=True, gate__profile="quick")
    linkage = [of for of in registered() if of.claim == "linkage"]
    put_report(project, *(result(code=of.code, title=of.title, version=of.version) for of in linkage))
    manifest = package(project, without_report=True)
    assert manifest.claims.made == ("linkage", "bound")
    assert manifest.privacy is not None
    assert manifest.privacy.not_covered == ("that attacks bear out the claims made: linkage",)
    assert "is the owner's word" in card(drawn_folder)
    assert verify_deep(drawn_folder / "release") == []


def test_a_choice_among_several_fits_is_not_covered(drawn_folder: Path) -> None:
    fit_poison(opened(drawn_folder), name="other")
    manifest = package(claiming(drawn_folder))
    assert manifest.privacy is not None
    assert manifest.privacy.not_covered == ("which fit is published: it was chosen among 2 fits",)
    assert "chosen among 2 fits" in card(drawn_folder)


def test_a_card_of_drawn_rows_does_not_say_that_rows_are_changed_features(drawn_folder: Path, finished: Path) -> None:
    package(claiming(drawn_folder))
    assert "belong to no image" in card(drawn_folder)
    assert "changed by a poisoning function" not in card(drawn_folder)
    assert "changed by a poisoning function" in card(finished)  # the control


def test_no_text_of_a_card_names_differential_privacy_without_its_condition(drawn_folder: Path) -> None:
    named = r"differential(?:ly)? priva|\(ε, δ\)|\bε ="
    for section in re.split(r"\n{2,}", fixed_card_text()):
        text = " ".join(section.split())
        if re.search(named, text) and "such fits of these images" not in text:
            assert "The condition:" in text or "for fixed networks" in text, text
    assert not re.search(named, CARD)
    package(claiming(drawn_folder))
    for section in (drawn_folder / "release" / "README.md").read_text().split("\n\n"):
        if re.search(named, section):
            assert CONDITION in " ".join(section.split())
    others = [path for path in (drawn_folder / "release").rglob("*.json") if path.name != "manifest.json"]
    assert [path for path in others if re.search(named, path.read_text())] == []


# --------------------------------------------------------------------------------------------- the manifest, the audit


def test_three_lines_compute_epsilon_again_from_the_public_numbers(drawn_folder: Path) -> None:
    package(claiming(drawn_folder))
    told = json.loads((drawn_folder / "release" / "manifest.json").read_text())["privacy"]
    import math

    import dp_accounting

    mu = math.sqrt(sum((told["sensitivity"] / sigma) ** 2 for sigma in told["noise"].values()))
    assert dp_accounting.get_epsilon_gaussian(1 / mu, told["delta"]) == pytest.approx(told["epsilon"], rel=1e-4)


def told_otherwise(folder: Path, **changes: Any) -> Path:
    """The release, with another mechanism in its manifest and all else as `package` would write it."""
    release, manifest = folder / "release", manifest_of(folder)
    assert manifest.privacy is not None
    tree = manifest.privacy.model_dump() | changes
    files = describe_files(release)
    write_manifest(release, manifest.model_copy(update={"privacy": Mechanism.model_validate(tree), "files": files}))
    assert verify(release) == []
    return release


def findings(release: Path, project: Project | None = None) -> set[str]:
    return {result.check.name for result in audit(release, project).results if result.findings}


def test_an_audit_computes_epsilon_again_and_compares_with_the_ledger(drawn_folder: Path) -> None:
    package(claiming(drawn_folder))
    project = opened(drawn_folder)
    found = audit(drawn_folder / "release", project)
    assert (found.findings, found.complete) == ((), True)
    assert findings(told_otherwise(drawn_folder, epsilon=3.0, epsilon_of_all=3.0)) == {"bound"}
    assert findings(told_otherwise(drawn_folder, epsilon=4.0, epsilon_of_all=2.0)) == {"bound"}
    assert findings(told_otherwise(drawn_folder, epsilon_of_all=4.0)) == set()


def test_an_audit_with_the_vault_finds_what_the_ledger_says_otherwise(drawn_folder: Path) -> None:
    package(claiming(drawn_folder))
    project, ledger = opened(drawn_folder), drawn_folder / "vault" / PRIVACY_LEDGER
    known = ledger.read_text()
    assert findings(drawn_folder / "release", project) == set()
    ledger.write_text(known.replace('"clip": 1.0', '"clip": 2.0'))
    assert findings(drawn_folder / "release", project) == {"spending"}
    ledger.write_text(known)
    releases = drawn_folder / "vault" / "ledger.json"
    entries = json.loads(releases.read_text())
    tree = json.loads(known)
    other = tree[0] | {"id": "f" * 64, "published": ["shapes 0.9.0"]}
    ledger.write_text(json.dumps([*tree, other]))
    before = entries[0] | {"fit": "f" * 64, "version": "0.9.0", "manifest_sha256": "e" * 64}
    releases.write_text(json.dumps([before, *entries]))  # one that was published before, and is not counted
    assert findings(drawn_folder / "release", project) == {"spending"}


@pytest.mark.parametrize(
    "changes",
    [
        {"epsilon": "4"},
        {"epsilon": 1e300},
        {"noise": {"count": 0.0, "sum": 1.0, "second moment": 1.0}},
        {"noise": {"count": 1.0, "sum": 1.0, "second moment": 1.0, "more": 1.0}},
        {"not_covered": ["\x1b[31m"]},
        {"not_covered": ["x"] * 1000},
        {"not_covered": ["x" * 10_000]},
        {"library": "\u202e"},
        {"unit": "pixel"},
        {"fits": 0},
        {"delta": 1.0},
        {"more": 1},
    ],
    ids=str,
)
def test_a_strangers_mechanism_is_checked_on_reading(drawn: Path, changes: dict[str, Any], tmp_path: Path) -> None:
    mechanism = Mechanism.calibrated(4.0, 1e-5, (0.1, 0.3, 0.6), "image").model_dump(mode="json")
    fields = {"name": "a", "version": "1", "licence": "other", "task": "classification", "splits": {}, "files": []}

    def problems(privacy: dict[str, Any]) -> list[str]:
        return [problem.kind for problem in parse_manifest(json.dumps(fields | {"privacy": privacy}).encode())[1]]

    assert problems(mechanism) == []
    assert problems(mechanism | changes) == ["schema"]


def test_a_claim_in_a_manifest_without_a_mechanism_or_by_networks_that_saw_the_images_is_found(
    drawn_folder: Path,
) -> None:
    package(claiming(drawn_folder))
    release, manifest = drawn_folder / "release", manifest_of(drawn_folder)
    assert verify_deep(release) == []
    told_otherwise(drawn_folder, networks_saw_images=True)
    assert ["'bound'" in problem.detail for problem in verify_deep(release)] == [True]
    write_manifest(release, manifest.model_copy(update={"privacy": None}))
    assert any("'bound'" in problem.detail for problem in verify_deep(release))


def test_a_manifest_without_a_mechanism_has_the_bytes_that_it_had(project_folder: Path) -> None:
    package(opened(project_folder))
    assert '"privacy"' not in (project_folder / "release" / "manifest.json").read_text()


# --------------------------------------------------------------------------------------------- sizes


def true_sizes(project: Project) -> set[int]:
    """|S|, the sizes of its splits, and of the classes in all and in each split."""
    table = project.private_images.table
    of_split = {name: table.splits == name for name in set(table.splits)}
    masks = [table.targets >= 0, *of_split.values()]
    sizes = {int(mask.sum()) for mask in masks}
    for label in range(len(table.classes)):
        sizes |= {int((mask & (table.targets == label)).sum()) for mask in masks}
    return sizes


def numbers_said(release: Path) -> set[int]:
    """All whole numbers in public texts, and of each split the rows and those of each class."""
    said = {int(run) for _, text in public_texts(release) for run in re.findall(r"(?<![\w.])\d+(?![\w.])", text)}
    manifest = read_manifest(release)
    assert isinstance(manifest, Manifest)
    said |= set(manifest.splits.values())
    trees = [json.loads(path.read_text()) for path in release.rglob("*.json")]
    return said | {number for tree in trees for number in _integers(tree)}


def _integers(tree: Any) -> list[int]:
    if isinstance(tree, dict):
        return [number for key, part in tree.items() if key != "bytes" for number in _integers(part)]
    if isinstance(tree, list):
        return [number for part in tree for number in _integers(part)]
    return [tree] if isinstance(tree, int) and not isinstance(tree, bool) else []


def test_no_public_file_tells_how_many_images_there_are_with_rows_that_the_owner_gives(drawn_folder: Path) -> None:
    project = claiming(drawn_folder, poison__function="mixture:delta=1e-4,rows=70")
    fit_poison(project, restart=True)
    write_candidate(project, restart=True)
    package(project)
    sizes = true_sizes(project) - {32, 16, 8}  # pixels and channels
    assert sizes >= {120, 96, 48, 12, 6, 60}
    assert {140, 14} <= numbers_said(drawn_folder / "release")
    assert not sizes & numbers_said(drawn_folder / "release")


def test_no_public_file_tells_how_many_images_there_are_with_noisy_counts(drawn_folder: Path) -> None:
    project = claiming(drawn_folder)
    state = project.vault.function("default") / "state.safetensors"
    from safetensors.numpy import load

    counts = load(state.read_bytes())["0/count"].sum(1)
    assert not (counts == counts.round()).any()  # never the exact ones: noise is on them
    rows = manifest_rows = package(project).splits
    assert manifest_rows["train"] == sum(max(round(float(count)), 1) for count in counts)
    # What follows from the noisy counts is near the true sizes, or like one of them, by the noise alone.
    shards = read_index(drawn_folder / "release" / "features").splits.values()
    by_noise = {*rows.values(), *(shard.rows for split in shards for shard in split)}
    told = numbers_said(drawn_folder / "release") - by_noise
    assert not (true_sizes(project) - {32, 16, 8}) & told


def test_a_published_report_of_attacks_does_not_tell_how_many_images_there_are(drawn_folder: Path) -> None:
    project = opened(drawn_folder, claims__linkage=True, poison__function="mixture:delta=1e-4,rows=70")
    fit_poison(project, restart=True)
    write_candidate(project, restart=True)
    short = result(rows=96, among=48, verdict="inconclusive", reasons=("96 rows, the profile wants 1000",))
    put_report(project, short)
    with pytest.raises(RefusedError, match="96 rows, the profile wants 1000"):
        package(project)  # to the owner it is told
    package(project, accept_risk=REASON)
    assert "90 rows, the profile wants 1000" in card(drawn_folder)
    assert {90, 40} <= numbers_said(drawn_folder / "release")
    assert not (true_sizes(project) - {32, 16, 8}) & numbers_said(drawn_folder / "release")
    assert verify_deep(drawn_folder / "release") == []


def test_composition_is_the_root_of_the_sum_of_squares() -> None:
    one = Mechanism.calibrated(4.0, 1e-5, (0.1, 0.3, 0.6), "image").mu
    assert composed([one, one]) == pytest.approx(one * 2**0.5)
    assert epsilon_of(composed([one]), 1e-5) == pytest.approx(4.0, rel=1e-4)
