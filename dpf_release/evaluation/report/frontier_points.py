"""The points of the frontier, as JSON and as plots. No torch."""

from __future__ import annotations

import itertools

from pydantic import BaseModel, ConfigDict

from dpf_release.evaluation.report.plots import Points, scatter_panels, scatter_plot
from dpf_release.release.attack_report import AttackReport, Interval

FRONTIER = "frontier.json"  # under the vault's reports


class FrontierPoint(BaseModel):
    """A fitted function between privacy and use."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)

    name: str
    function: str = ""  # what it is, as `dpf.toml` names it, with objective and weight where it is learned
    privacy: Interval | None = None  # the most that an attack of the claim `reconstruction` leaks
    linkage: Interval | None = None  # share of rows that A5 finds for a picture
    u2: Interval | None = None  # of a classifier on the bank alone
    u3: Interval | None = None  # of one with the most own images a class that were tried


class Frontier(BaseModel):
    """`frontier.json`."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    points: tuple[FrontierPoint, ...] = ()
    profile: str = ""
    metric: str = "top1"  # what U2 and U3 are; or `mae`, of which less is better
    references: dict[str, Interval] = {}  # what they are without any P: by names like `u2 on clean rows`


AXES = {
    "privacy": "leakage of the worst attack: left is safer",
    "linkage": "row found for a picture: left is safer",
    "u2": "U2: the bank alone",
    "u3": "U3: with own pictures",
}
REFERENCES = {"u2": ("on clean rows",), "u3": ("with clean rows", "own images alone")}


def point_of(name: str, function: str, report: AttackReport) -> FrontierPoint:
    """What a report comes to."""
    leaked = [result.leakage for result in report.attacks if result.claim == "reconstruction" and result.leakage]
    linked = [result.re_identification for result in report.attacks if result.code == "A5"]
    return FrontierPoint(
        name=name,
        function=function,
        privacy=max(leaked, key=lambda found: found.value, default=None),
        linkage=linked[0] if linked else None,
        u2=_found(report, "U2", ""),
        u3=_found(report, "U3", ""),
    )


def references_of(report: AttackReport) -> dict[str, Interval]:
    """What is the same for every function of a project."""
    found = {f"{y} {what}": _found(report, y.upper(), what) for y, labels in REFERENCES.items() for what in labels}
    return {name: interval for name, interval in found.items() if interval}


def metric_of(report: AttackReport) -> str:
    """`top1` or `mae`."""
    return "mae" if "U2" in report.utility and "mae" in report.utility["U2"].measures else "top1"


def _found(report: AttackReport, code: str, what: str) -> Interval | None:
    """A measure of U2, or of U3 with the most own images."""
    measures = report.utility[code].measures if code in report.utility else {}
    metric = metric_of(report)
    if code == "U2":
        return measures.get(f"{metric} {what}".strip())
    parts = [name.split(", ") for name in measures if name.startswith(f"{metric}, ")]
    most = max((int(part[1].removeprefix("m = ")) for part in parts), default=0)
    return measures.get(", ".join(filter(None, (metric, f"m = {most}", what))))


def frontier_plots(frontier: Frontier) -> list[tuple[str, str]]:
    """Each measure of privacy against each of use, as (what, SVG), where any point has both; points by number."""
    return [
        (f"{AXES[x]}; {AXES[y]}", scatter_plot(pairs, AXES[x], AXES[y], references))
        for x, y, pairs, references in _panels(frontier)
    ]


def plot(frontier: Frontier, kind: str = "svg") -> bytes:
    """All of these side by side, with the names of the points: a file (`svg` or `png`) that stands alone."""
    panels = [(pairs, AXES[x], AXES[y], references) for x, y, pairs, references in _panels(frontier)]
    legend = [f"{number} {point.name}: {point.function}" for number, point in enumerate(frontier.points, 1)]
    return scatter_panels(panels, legend, kind)


def _panels(frontier: Frontier) -> list[tuple[str, str, Points, dict[str, Interval]]]:
    found: list[tuple[str, str, Points, dict[str, Interval]]] = []
    for x, y in itertools.product(("privacy", "linkage"), REFERENCES):
        both = {str(number): (getattr(point, x), getattr(point, y)) for number, point in enumerate(frontier.points, 1)}
        if pairs := {number: pair for number, pair in both.items() if all(pair)}:
            lines = {label: frontier.references.get(f"{y} {label}") for label in REFERENCES[y]}
            found.append((x, y, pairs, {label: at for label, at in lines.items() if at}))
    return found
