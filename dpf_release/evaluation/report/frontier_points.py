"""The points of the frontier, as JSON and as plots. No torch."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from dpf_release.evaluation.report.plots import Points, scatter_panels, scatter_plot
from dpf_release.release.attack_report import AttackReport, Interval

FRONTIER = "frontier.json"  # under the vault's reports


class FrontierPoint(BaseModel):
    """A fitted function between privacy and use."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)

    name: str
    function: str = ""  # what it is, as `dpf.toml` names it, with objective and weight where it is learned
    epsilon: float | None = None  # of the privacy bound of its rows; None: they have none
    privacy: Interval | None = None  # the most that an attack of the claim `reconstruction` leaks
    linkage: Interval | None = None  # share of rows that A5 finds for a picture
    m: str = ""  # own images a class, the fewest that were tried, as `m = 10`
    gain: Interval | None = None  # what the bank adds to the best that a user with m own images has without it
    gain_of_clean: Interval | None = None  # what clean rows add to that


class Frontier(BaseModel):
    """`frontier.json`."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    points: tuple[FrontierPoint, ...] = ()
    profile: str = ""


AXES = {
    "privacy": "leakage of the worst attack: left is safer",
    "linkage": "row found for a picture: left is safer",
    "gain": "what the bank adds to the best without it",
}


def point_of(name: str, function: str, epsilon: float | None, report: AttackReport) -> FrontierPoint:
    """What a report comes to."""
    leaked = [result.leakage for result in report.attacks if result.claim == "reconstruction" and result.leakage]
    linked = [result.re_identification for result in report.attacks if result.code == "A5"]
    with_own = {m: gains for m, gains in report.gains.items() if m}
    m = min(with_own, key=lambda m: int(m.removeprefix("m = ")), default="")
    gain, of_clean, _ = with_own.get(m, (None, None, ""))
    return FrontierPoint(
        name=name,
        function=function,
        epsilon=epsilon,
        privacy=max(leaked, key=lambda found: found.value, default=None),
        linkage=linked[0] if linked else None,
        m=m,
        gain=gain,
        gain_of_clean=of_clean,
    )


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
    for x in ("privacy", "linkage"):
        pairs = {
            str(number): (found_by, point.gain)
            for number, point in enumerate(frontier.points, 1)
            if (found_by := getattr(point, x)) and point.gain
        }
        if pairs:
            found.append((x, "gain", pairs, {}))
    return found
