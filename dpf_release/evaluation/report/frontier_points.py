"""The points of the frontier, as JSON and as plots. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from dpf_release.evaluation.report.plots import scatter_panels, scatter_plot
from dpf_release.release.attack_report import AttackReport, Interval

FRONTIER = "frontier.json"  # under the vault's reports


class FrontierPoint(BaseModel):
    """A fitted function between privacy and use.

    Attributes:
        name: of the fitted function.
        function: what it is, as `dpf.toml` names it, with objective and weight where it is learned.
        privacy: the most that an attack of the claim `reconstruction` leaks.
        linkage: share of rows that A5 finds for a picture.
        u2: of a classifier on the bank alone.
        u3: of one with the most own images a class that were tried.
    """

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)

    name: str
    function: str = ""
    privacy: Interval | None = None
    linkage: Interval | None = None
    u2: Interval | None = None
    u3: Interval | None = None


class Frontier(BaseModel):
    """`frontier.json`.

    Attributes:
        metric: what U2 and U3 are: `top1`, or `mae`, of which less is better.
        references: what U2 and U3 are without any P: `u2 on clean rows`, `u3 with clean rows`, `u3 own images alone`.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    points: tuple[FrontierPoint, ...] = ()
    profile: str = ""
    metric: str = "top1"
    references: dict[str, Interval] = {}


AXES = {
    "privacy": "leakage of the worst attack: left is safer",
    "linkage": "row found for a picture: left is safer",
    "u2": "U2: the bank alone",
    "u3": "U3: with own pictures",
}
REFERENCES = {
    "u2": {"on clean rows": "u2 on clean rows"},
    "u3": {"with clean rows": "u3 with clean rows", "own images alone": "u3 own images alone"},
}
Pairs = dict[str, tuple[Interval, Interval]]


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
    keys = {
        "u2 on clean rows": ("U2", "on clean rows"),
        "u3 with clean rows": ("U3", "with clean rows"),
        "u3 own images alone": ("U3", "own images alone"),
    }
    found = {name: _found(report, code, what) for name, (code, what) in keys.items()}
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
    """All of these side by side, with the names of the points: a file that stands alone.

    Args:
        frontier: the points.
        kind: `svg` or `png`.
    """
    panels = [(pairs, AXES[x], AXES[y], references) for x, y, pairs, references in _panels(frontier)]
    legend = [f"{number} {point.name}: {point.function}" for number, point in enumerate(frontier.points, 1)]
    return scatter_panels(panels, legend, kind)


def _panels(frontier: Frontier) -> list[tuple[str, str, Pairs, dict[str, Interval]]]:
    found = []
    for x in ("privacy", "linkage"):
        for y in ("u2", "u3"):
            pairs = _pairs(frontier.points, x, y)
            if pairs:
                lines = {label: frontier.references.get(key) for label, key in REFERENCES[y].items()}
                found.append((x, y, pairs, {label: at for label, at in lines.items() if at}))
    return found


def _pairs(points: Sequence[FrontierPoint], x: str, y: str) -> Pairs:
    return {
        str(number): (getattr(point, x), getattr(point, y))
        for number, point in enumerate(points, 1)
        if getattr(point, x) and getattr(point, y)
    }
