"""`compare`: several fitted functions, between what they protect and what they leave to use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dpf_release.bank.format import INDEX
from dpf_release.core.files import make_folder
from dpf_release.core.progress import announce
from dpf_release.errors import VaultError
from dpf_release.evaluation.report.frontier_points import FRONTIER, Frontier, plot, point_of
from dpf_release.evaluation.report.page import write_page
from dpf_release.evaluation.suite import attack
from dpf_release.owner.fit_poison import unit_of
from dpf_release.owner.fitted import load_function
from dpf_release.owner.project import Project
from dpf_release.release.attack_report import AttackReport


def compare(
    project: Project,
    names: Sequence[str] = (),
    profile: str = "quick",
    *,
    budget_minutes: float | None = None,
    seed: int = 0,
) -> Frontier:
    """Attacks each candidate where that was not done yet, and keeps one point each as `vault/reports/frontier.json`.

    Beside it `frontier.svg` and `frontier.png`, and the functions' pages are written anew with the plots. All is
    written again after each function, so that what is done can be looked at. Options are as of `attack`, for each
    function; without names it is all that have a candidate.

    Raises:
        ConfigError: no such profile.
        VaultError: some of the functions have no candidate, or there are none.
    """
    candidates = sorted(path.name for path in project.vault.root.glob("candidates/*") if path.is_dir())
    names = list(dict.fromkeys(names)) or [name for name in candidates if _has_candidate(project, name)]
    missing = [name for name in names if not _has_candidate(project, name)]
    if missing or not names:
        raise VaultError(
            f"expected fitted functions with a candidate, found none of {', '.join(missing) or 'any name'}. Run "
            "`dpf-release fit-poison --name NAME` and `dpf-release poison --name NAME` for each."
        )
    reports: dict[str, AttackReport] = {}
    frontier = Frontier(profile=profile)
    for number, name in enumerate(names, 1):
        announce(f"{name}, {number} of {len(names)}")
        reports[name] = attack(project, name, profile, budget_minutes=budget_minutes, seed=seed)
        with project.working(public=True, together=False):
            frontier = _write(project, reports, profile)
    return frontier


def _write(project: Project, reports: Mapping[str, AttackReport], profile: str) -> Frontier:
    points = [
        point_of(name, _described(project, name), _epsilon(project, name), report) for name, report in reports.items()
    ]
    frontier = Frontier(points=tuple(points), profile=profile)
    vault, folder = project.vault, make_folder(project.vault.root / "reports")
    vault.write_json(folder / FRONTIER, frontier.model_dump(mode="json"))
    for kind in ("svg", "png"):
        vault.write_bytes((folder / FRONTIER).with_suffix(f".{kind}"), plot(frontier, kind))
    for name, report in reports.items():
        write_page(vault, name, report)
    return frontier


def _described(project: Project, name: str) -> str:
    """What a function is: `dpf, equivalence, λ = 1`."""
    record = project.vault.read_record(project.vault.function(name) / "function.json", f"fit-poison --name {name}")
    recipe: Mapping[str, Any] = record["recipe"]
    learned = recipe["function"].split("+")[-1].split(":")[0] == "dpf"
    return recipe["function"] + (f", {recipe['objective']}, λ = {recipe['lambda']:g}" if learned else "")


def _epsilon(project: Project, name: str) -> float | None:
    mechanism = load_function(project, name).chain.mechanism(unit_of(project))
    return mechanism.epsilon if mechanism else None


def _has_candidate(project: Project, name: str) -> bool:
    return project.vault.holds(project.vault.candidate(name) / "features" / INDEX)
