"""The gate: what a release may promise, by what attacks on exactly its bank reached; and what of that is public."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bare_banks import digests
from commands import run_cli
from dpf_release.attacks import a01_clean_decoders as straw_men
from dpf_release.attacks.interface import ATTACKS, Attack, registered
from dpf_release.attacks.threat_models import Budget, LeakedVault, TwoReleases
from dpf_release.attacks.toolkit import trained
from dpf_release.core.files import sha256_of, write_json
from dpf_release.errors import RefusedError, VaultError
from dpf_release.evaluation.failed_attacks import FAILURES, failures, note_failures
from dpf_release.evaluation.profiles import PROFILES
from dpf_release.evaluation.suite import attack, report_file
from dpf_release.owner.config import ClaimsSection, GateSection
from dpf_release.owner.fit_poison import fit_poison
from dpf_release.owner.poison import write_candidate
from dpf_release.owner.project import Project
from dpf_release.owner.retract import retract
from dpf_release.owner.vault.contents import look_at
from dpf_release.publish.gate import objections, pass_gate, same_but_for_dropped_rows
from dpf_release.publish.package import package
from dpf_release.release.attack_report import AttackReport, AttackResult, Interval, Power, Way, public_report
from dpf_release.release.contents import verify_deep
from dpf_release.release.manifest import ATTACK_REPORT, Manifest, describe_files, write_manifest
from dpf_release.release.verify import read_manifest
from in_process import _structure_in_process  # noqa: F401  # for all tests here

REASON = "For a workshop of ten, who signed for it."
FOUND = Interval(value=0.012345678, low=-0.000001, high=0.03)


def promising(folder: Path, **overrides: Any) -> Project:
    dotted = {key.replace("__", "."): value for key, value in overrides.items()}
    return Project.open(folder / "dpf.toml", {"claims.reconstruction": True, **dotted})


def passed(of: Attack, **changes: Any) -> AttackResult:
    fields: dict[str, Any] = {
        "code": of.code,
        "title": of.title,
        "version": of.version,
        "claim": of.claim,
        "granted": "ReleaseView",
        "rows": 1000,
        "images": 150_000,
        "seconds": 71.3,
        "ways": {"a decoder": Way(measures={"affine_ssim": FOUND}, leakage=FOUND)},
        "baseline": 0.2,
        "ceiling": 0.7,
        "leakage": FOUND,
        "re_identification": FOUND,
        "among": 200,
        "power": Power(passed=True, planted={"weak-noise": Interval(value=0.9, low=0.88, high=0.92)}),
        "verdict": "pass",
    }
    return AttackResult(**fields | changes)


def good_report(index_sha256: str = "0" * 64, featurizer_sha256: str = "1" * 64, **changes: Any) -> AttackReport:
    fields: dict[str, Any] = {
        "index_sha256": index_sha256,
        "featurizer_sha256": featurizer_sha256,
        "public_images_sha256": "2" * 64,
        "profile": "standard",
        "seed": 0,
        "function": "my-secret-name",
        "limits": GateSection().limits,
        "attacks": tuple(passed(of) for of in registered()),
    }
    return AttackReport(**fields | changes)


def put_report(project: Project, name: str = "default", **changes: Any) -> AttackReport:
    """A report that passes all claims for today's candidate, but for what is changed."""
    index = project.vault.candidate(name) / "features" / "index.json"
    report = good_report(sha256_of(index), project.cut.featurizer_sha256).model_copy(update=changes)
    for path in project.vault.reports(name).glob("attack-*.json"):
        path.unlink()
    path = project.vault.reports(name) / report_file(report.profile)
    project.vault.write_json(path, report.model_dump(mode="json"))
    return report


def manifest_of(folder: Path) -> Manifest:
    manifest = read_manifest(folder / "release")
    assert isinstance(manifest, Manifest)
    return manifest


def card(folder: Path) -> str:
    return (folder / "release" / "README.md").read_text(encoding="utf-8")


# --------------------------------------------------------------------------------------------- what passes


def test_what_is_promised_wants_a_pass_and_with_it_is_promised_in_public(project_folder: Path) -> None:
    before = digests(project_folder / "release")
    with pytest.raises(RefusedError, match="reconstruction: no attack was run on this bank") as caught:
        package(promising(project_folder))
    for words in ("Nothing was published", "dpf-release attack --name default --profile standard", "--accept-risk"):
        assert words in str(caught.value)
    assert caught.value.exit_code == 3
    assert digests(project_folder / "release") == before

    put_report(promising(project_folder), not_applicable={"A8": "no column 'person' in images/private.csv"})
    manifest = package(promising(project_folder))
    assert manifest.claims.made == ("reconstruction",)
    assert manifest.claims.not_made == ("linkage", "attribute")
    assert verify_deep(project_folder / "release") == []
    text = card(project_folder)
    assert "Claims made: **reconstruction**" in text
    assert "- claimed (`reconstruction`): that no picture" in text
    assert "profile **standard**, on exactly this bank" in text
    row = "| A1 straw man and unseen reconstructors | reconstruction | 0.200 | 0.012 | 0.700 | 0.012 [0.000, 0.030] |"
    assert f"{row} 1.2% [0.0%, 3.0%], of 200 | yes | pass |" in text
    assert "| A8 |  |  |  |  |  |  |  | not applicable |" in text
    assert "The protection is empirical" in text
    first = digests(project_folder / "release")
    package(promising(project_folder))
    assert digests(project_folder / "release") == first


def test_the_public_report_has_the_numbers_and_nothing_of_the_owner(project_folder: Path) -> None:
    put_report(promising(project_folder), not_applicable={"A8": "no column 'person' in images/private.csv"})
    package(promising(project_folder))
    text = (project_folder / "release" / ATTACK_REPORT).read_text(encoding="utf-8")
    private = (project_folder / "vault" / "reports" / "default" / report_file("standard")).read_text(encoding="utf-8")
    for words in ("my-secret-name", "71.3", "2" * 64, "person", "0.012345678"):
        assert words in private
        assert words not in text
    report = AttackReport.model_validate_json(text)
    assert report.attacks[0].leakage == Interval(value=0.0123, low=0.0, high=0.03)
    assert report.not_applicable == {"A8": ""}
    assert report.claims_not_made == ("linkage", "attribute")
    assert public_report(report) == report
    assert "-0.0" not in text.split()


def test_where_nothing_is_promised_a_report_is_shown_if_it_is_of_this_bank(project_folder: Path) -> None:
    project = Project.open(project_folder / "dpf.toml")
    put_report(project, profile="quick")
    assert package(project).claims.made == ()
    assert "those of profile **quick**" in card(project_folder)
    put_report(project, index_sha256="9" * 64)
    assert ATTACK_REPORT not in {file.path for file in package(project).files}
    assert "Attacks measured: **none**" in card(project_folder)
    (project.vault.reports("default") / report_file("standard")).write_text('{"format": "other"}')
    with pytest.raises(VaultError, match="not a report of attacks of this version"):
        package(project)


# --------------------------------------------------------------------------------------------- what does not pass


def _first(**changes: Any) -> Callable[[AttackReport], dict[str, Any]]:
    def change(report: AttackReport) -> dict[str, Any]:
        at = [result.code for result in report.attacks].index("A1")
        changed = report.attacks[at].model_copy(update=changes)
        return {"attacks": (*report.attacks[:at], changed, *report.attacks[at + 1 :])}

    return change


def _without_a1(report: AttackReport) -> dict[str, Any]:
    return {"attacks": tuple(result for result in report.attacks if result.code != "A1")}


def _harder_one(verdict: str) -> Callable[[AttackReport], dict[str, Any]]:
    def change(report: AttackReport) -> dict[str, Any]:
        more = report.attacks[0].model_copy(
            update={"code": "A99", "claim": "reconstruction", "verdict": verdict, "reasons": ("leakage 0.4",)}
        )
        return {"attacks": (*report.attacks, more), "profile": "full"}

    return change


LIMITS = GateSection().limits


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda report: {}, None),
        (lambda report: {"profile": "full"}, None),
        (lambda report: {"profile": "quick"}, "attacks of profile quick were run, those of standard are wanted"),
        (_first(verdict="inconclusive", reasons=("too few rows",)), "A1 .*: inconclusive, too few rows"),
        (_first(verdict="fail", reasons=("leakage 0.900",)), "A1 .*: fail, leakage 0.900"),
        (_first(version=0), "version 0 was run, today's is 1"),
        (_without_a1, "A1 .*: was not run"),
        (_harder_one("inconclusive"), None),
        (_harder_one("fail"), "A99 .*: fail, leakage 0.4"),
        (lambda report: {"limits": LIMITS | {"leakage": 0.05}}, None),  # a pass under a stricter limit is one
        (lambda report: {"limits": LIMITS | {"leakage": 0.2}}, "a limit for leakage of 0.2, today's is 0.1"),
        (lambda report: {"limits": {}}, "a limit for leakage of None"),
        (
            lambda report: {"attacks": (), "not_applicable": {of.code: "" for of in registered()}},
            "no attack of profile standard that applies here speaks of it",
        ),
    ],
)
def test_each_thing_that_speaks_against_a_claim_is_named(
    change: Callable[[AttackReport], dict[str, Any]], says: str | None
) -> None:
    report = good_report()
    report = report.model_copy(update=change(report))
    found = objections("reconstruction", report, ClaimsSection(), GateSection())
    if says is None:
        assert found == []
    else:
        assert re.search(says, "\n".join(found))


def test_an_attack_that_does_not_apply_is_not_missed_where_another_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Second(Attack):
        code, title, profile = "A99", "a second one", "quick"

    monkeypatch.setitem(ATTACKS, "A99", Second)
    report = good_report(attacks=tuple(passed(of) for of in registered() if of.code != "A99"))
    assert objections("reconstruction", report, ClaimsSection(), GateSection()) == ["A99 a second one: was not run"]
    noted = report.model_copy(update={"not_applicable": {"A99": "needs what is not there"}})
    assert objections("reconstruction", noted, ClaimsSection(), GateSection()) == []
    monkeypatch.setattr(Second, "profile", "full")
    assert objections("reconstruction", report, ClaimsSection(), GateSection()) == []
    assert objections("reconstruction", report, ClaimsSection(), GateSection(profile="full")) != []


def test_a_function_without_a_secret_wants_the_attack_of_who_has_it_and_two_releases_that_of_who_has_both() -> None:
    report = good_report(profile="full")
    assert next(result for result in report.attacks if result.code == "A0").claim is None
    known = (LeakedVault,)
    assert objections("reconstruction", report, ClaimsSection(), GateSection(), known) == []
    of = ATTACKS["A0"]()
    broken = passed(of, claim="reconstruction", verdict="fail", reasons=("leakage 0.9",))
    others = tuple(result for result in report.attacks if result.code != "A0")
    failed = report.model_copy(update={"attacks": (broken, *others)})
    assert "A0" in objections("reconstruction", failed, ClaimsSection(), GateSection(), known)[0]
    missing = report.model_copy(update={"attacks": others, "not_applicable": {"A0": "no"}})
    assert objections("reconstruction", missing, ClaimsSection(), GateSection()) == []
    assert "A0" in objections("reconstruction", missing, ClaimsSection(), GateSection(), known)[0]
    alone = tuple(result for result in report.attacks if result.code != "A9")
    stale = report.model_copy(update={"attacks": alone, "not_applicable": {"A9": "no other release"}})
    full = GateSection(profile="full")
    assert objections("reconstruction", stale, ClaimsSection(), full) == []
    assert "A9" in objections("reconstruction", stale, ClaimsSection(), full, (TwoReleases,))[0]
    joined = passed(ATTACKS["A9"](), beside="3" * 64)
    beside = report.model_copy(update={"attacks": (*alone, joined)})

    def said(*others: str) -> list[str]:
        return objections("reconstruction", beside, ClaimsSection(), full, (TwoReleases,), others)

    assert said("3" * 64) == []
    assert "beside each of the 1 other releases" in said("4" * 64)[0]
    assert "beside each of the 2 other releases" in said("3" * 64, "4" * 64)[0]
    older = report.model_copy(update={"scorer": 0})
    assert "scorer" in objections("reconstruction", older, ClaimsSection(), full)[0]


def test_an_attribute_is_promised_only_as_the_one_that_was_attacked(monkeypatch: pytest.MonkeyPatch) -> None:
    class Probe(Attack):
        code, title, claim = "A98", "a probe", "attribute"

    for code in [of.code for of in registered() if of.claim == "attribute"]:
        monkeypatch.delitem(ATTACKS, code)
    monkeypatch.setitem(ATTACKS, "A98", Probe)
    report, wanted = good_report(attribute="person"), ClaimsSection(attribute="person")
    assert objections("attribute", report, wanted, GateSection()) == []
    assert "another attribute" in objections("attribute", report, ClaimsSection(attribute="age"), GateSection())[0]


# --------------------------------------------------------------------------------------------- a risk that is accepted


def test_an_accepted_risk_publishes_without_the_claims_and_says_why(project_folder: Path) -> None:
    assert package(Project.open(project_folder / "dpf.toml")).claims.made == ()
    config = project_folder / "dpf.toml"
    config.write_text(config.read_text().replace("reconstruction = false", "reconstruction = true"))
    with pytest.raises(RefusedError, match="no attack was run on this bank") as refused:
        package(Project.open(config))
    assert refused.value.exit_code == 3
    done = run_cli("package", "--accept-risk", REASON, folder=project_folder)
    assert "Claims made: none. Claims not made: reconstruction, linkage, attribute." in done.stdout, done.stderr
    assert "No attack battery was run on it." in done.stdout
    text = card(project_folder)
    assert f"The owner's reason: {REASON}" in text
    assert "- reconstruction: no attack was run on this bank" in text
    assert "Attacks measured: **none**; no attack battery was run on this bank." in text
    assert json.loads((project_folder / "vault" / "ledger.json").read_text())[-1]["accepted_risk"] == REASON


def test_of_several_claims_only_those_that_fail_are_not_made(project_folder: Path) -> None:
    put_report(promising(project_folder))
    project = promising(project_folder, claims__attribute="person")
    with pytest.raises(RefusedError) as caught:
        package(project, accept_risk="  \n ")
    assert "reconstruction:" not in str(caught.value)
    assert package(project, accept_risk=REASON).claims.made == ("reconstruction",)
    assert "- attribute: attacks were run for another attribute" in card(project_folder)
    with pytest.raises(RefusedError, match="private text"):
        package(project, accept_risk="disc-portrait-012 agreed")
    package(promising(project_folder), accept_risk=REASON)  # where all passes, there is none to accept
    assert REASON not in card(project_folder)


# --------------------------------------------------------------------------------------------- retraction


def test_rows_that_were_only_dropped_inherit_what_was_found_and_rebuilt_ones_do_not(project_folder: Path) -> None:
    put_report(promising(project_folder))
    package(promising(project_folder))
    trained = project_folder / "vault" / "attackers" / "A7-0.safetensors"
    trained.parent.mkdir(mode=0o700)
    trained.write_bytes(b"may show a person")
    cut_off = trained.with_name(trained.name + ".partial")
    cut_off.write_bytes(b"may show half of one")
    ids = [
        line["id"] for line in Project.open(project_folder / "dpf.toml").vault.read_ids() if line["split"] == "train"
    ]
    for gone in (ids[:2], ids[2:3]):
        retract(promising(project_folder), gone)
    assert not trained.exists()
    assert not cut_off.exists()
    manifest = package(promising(project_folder))
    assert (manifest.version, manifest.claims.made) == ("1.0.1", ("reconstruction",))
    assert "on this bank as it was before 3 rows were dropped" in card(project_folder)
    assert json.loads((project_folder / "release" / ATTACK_REPORT).read_text())["dropped_since"] == 3
    assert verify_deep(project_folder / "release") == []
    record = project_folder / "vault" / "functions" / "default" / "candidate.json"
    tree = json.loads(record.read_text())
    tree["retracted"][-1]["rebuilt"] = 1
    write_json(record, tree)
    with pytest.raises(RefusedError, match="no attack was run on this bank"):
        package(promising(project_folder))


def test_the_chain_of_banks_ends_where_a_row_was_rebuilt() -> None:
    steps = [
        {"dropped_from": "a", "dropped": 1, "rebuilt": 0},
        {"dropped_from": "b", "dropped": 2, "rebuilt": 5},
        {"dropped_from": "c", "dropped": 3, "rebuilt": 0},
        {"dropped_from": "d", "dropped": 4, "rebuilt": 0},
    ]
    assert same_but_for_dropped_rows("e", steps) == {"e": 0, "d": 4, "c": 7}
    assert same_but_for_dropped_rows("e", []) == {"e": 0}


# --------------------------------------------------------------------------------------------- what a reader checks


def test_a_reader_sees_claims_without_attacks_and_a_report_of_something_else(project_folder: Path) -> None:
    put_report(promising(project_folder))
    package(promising(project_folder))
    release, file = project_folder / "release", project_folder / "release" / ATTACK_REPORT
    good, manifest = file.read_bytes(), manifest_of(project_folder)

    def said(change: Callable[[Any], Any] | None, **claims: Any) -> str:
        tree = json.loads(good)
        if change:
            change(tree)
            write_json(file, tree)
        else:
            shutil.rmtree(file.parent)
        update = {"files": describe_files(release), "claims": manifest.claims.model_copy(update=claims)}
        write_manifest(release, manifest.model_copy(update=update))
        found = " ".join(
            f"{problem.kind} {problem.detail}" for problem in verify_deep(release) if "lists" not in str(problem)
        )
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(good)
        return found

    def verdict(to: str) -> Callable[[Any], None]:
        return lambda tree: [result.update(verdict=to) for result in tree["attacks"]]

    assert "claims" not in said(lambda tree: None)
    assert "claims 'reconstruction', which no attack" in said(None)
    assert "claims 'reconstruction', which no attack" in said(verdict("fail"))
    assert "claims 'linkage', which no attack" in said(verdict("inconclusive"), made=("linkage",))
    assert "is of another bank" in said(lambda tree: tree.update(index_sha256="3" * 64))
    assert "differ in the claims that are not made" in said(lambda tree: tree.update(claims_not_made=["linkage"]))
    assert "differ in the claims that are not made" in said(lambda tree: tree.update(claims_not_made=None))
    assert "is of another featurizer" in said(lambda tree: tree.update(featurizer_sha256="3" * 64))
    assert "expected numbers of four decimals" in said(lambda tree: tree.update(function="mine"))
    assert "schema" in said(lambda tree: tree.update(more="hidden"))
    assert "schema" in said(lambda tree: tree["attacks"][0].update(title="\x1b[2J"))


# --------------------------------------------------------------------------------------------- a bad release


@pytest.mark.slow
def test_a_weak_function_is_attacked_and_refused_with_the_reasons(
    project_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control, a report that passes, is above: the same project, network and gate."""
    short = replace(PROFILES["quick"], budget=Budget(images=2000, decoders=1, shadows=0))
    monkeypatch.setitem(PROFILES, "quick", short)
    monkeypatch.setattr(straw_men, "DECODERS", straw_men.DECODERS[1:2])  # it learns with the least
    monkeypatch.setattr(trained, "TRAINING_BATCH", 16)
    project = promising(project_folder, poison__function="gaussian-noise:scale=0.1")
    fit_poison(project, name="weak")
    write_candidate(project, "weak")
    report = attack(project, "weak", "quick", only=["A1"])
    assert report.limits == LIMITS
    (result,) = report.attacks
    assert result.verdict == "fail"
    assert list((project.vault.root / "attackers").iterdir())
    assert look_at(project.vault.root).strangers == ()  # a vault with what attackers keep can be sealed
    with pytest.raises(RefusedError) as caught:
        package(project, "weak", second_function="for a test")
    assert "attacks of profile quick were run, those of standard are wanted" in str(caught.value)
    assert f"A1 {result.title}: fail" in str(caught.value)

    # What failed once is not forgotten where another seed is drawn, until a report passes.
    index = put_report(project, "weak", seed=1).index_sha256
    with pytest.raises(RefusedError, match="reconstruction: A1 .*, profile quick, seed 0: fail, leakage"):
        pass_gate(project, "weak", index)
    assert "seed 0: fail" not in card(project_folder)
    (noted,) = failures(project.vault, "weak")
    (project.vault.reports("weak") / FAILURES).unlink()
    assert pass_gate(project, "weak", index).claims.made == ("reconstruction",)
    for other in (
        noted.model_copy(update={"index_sha256": "9" * 64}),  # another bank
        noted.model_copy(update={"version": 0}),
        noted.model_copy(update={"scorer": 0}),
        noted.model_copy(update={"limits": LIMITS | {"leakage": 0.01}}),  # stricter than today's
        noted.model_copy(update={"claim": "linkage"}),
    ):
        note_failures(project.vault, "weak", [other])
    assert len(failures(project.vault, "weak")) == 5
    assert pass_gate(project, "weak", index).claims.made == ("reconstruction",)
    for same in (noted, noted.model_copy(update={"limits": LIMITS | {"leakage": 0.5, "auc": 0.5}})):
        note_failures(project.vault, "weak", [same])
        with pytest.raises(RefusedError, match="seed 0: fail"):
            pass_gate(project, "weak", index)
    (project.vault.reports("weak") / FAILURES).write_text('[{"code": "A1"}]')
    with pytest.raises(VaultError, match="does not list failed attacks"):
        pass_gate(project, "weak", index)
