"""The report's plots, as SVG text. The same numbers give the same bytes: no dates, ids from a fixed salt."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec
from matplotlib.transforms import Bbox

from dpf_release.release.attack_report import AttackResult, Interval

INK, SOFT, GRID = "#1c2126", "#545d66", "#d9dcdf"
COLOURS = {"fail": "#96170f", "pass": "#14613a", "inconclusive": "#8a6700", "reported": "#0b5394"}
SERIES = ("#0b5394", "#96170f", "#14613a", "#8a6700", "#5b3a8c")
STYLE: Any = {  # of `rc_context`, whose type lists every key there is
    "svg.hashsalt": "dpf-release",
    "svg.fonttype": "path",  # looks the same everywhere
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 10,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.parse_math": False,
}
Points = Mapping[str, tuple[Interval, Interval]]
Panel = tuple[Points, str, str, Mapping[str, Interval]]  # points, what x and y are, lines across
DOT = 4  # points from the middle of a point that no label covers
DISTANCES, DIRECTIONS = (5, 12, 20, 30, 42, 56, 72), 16  # points; tried in this order for a label
WIDTH = 4.6  # inches: about as wide as a phone, so that the letters stay readable there


def leakage_plot(results: Sequence[AttackResult]) -> str:
    """The leakage of each attack that has one, with its interval: 0 is nothing beyond the label, 1 all of it."""
    shown = [result for result in results if result.leakage]
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(0.9 + 0.3 * len(shown))
        for line, result in enumerate(shown):
            assert result.leakage is not None
            _point(axes, result.leakage, Interval(value=line, low=line, high=line), COLOURS[result.verdict])
        axes.set_yticks(range(len(shown)), [result.code for result in shown])
        axes.set_ylim(len(shown) - 0.5, -0.5)
        for place in (0, 1):
            axes.axvline(place, color=SOFT, linewidth=0.8, linestyle="--", zorder=0)
        low, high = axes.get_xlim()
        axes.set_xlim(min(low, -0.1), max(high, 1.1))
        axes.set_xlabel("leakage, 95 % interval")
        return _svg(figure)


def series_plot(series: Mapping[str, Mapping[str, Interval]]) -> str:
    """A measure against a number (of known pairs, of shadow functions), a line a series."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(2.8)
        numbers: list[float] = []
        for place, (name, values) in enumerate(series.items()):
            points = sorted((float(number), value) for number, value in values.items())
            at, colour = [number for number, _ in points], SERIES[place % len(SERIES)]
            numbers += at
            axes.plot(at, [value.value for _, value in points], color=colour, marker="o", markersize=4, label=name)
            low, high = ([getattr(value, bound) for _, value in points] for bound in ("low", "high"))
            axes.fill_between(at, low, high, color=colour, alpha=0.2, linewidth=0)
        if min(numbers) > 0 and max(numbers) / min(numbers) >= 10:
            axes.set_xscale("log")
        ticks = sorted(set(numbers))
        axes.set_xticks(ticks, [f"{number:g}" for number in ticks])
        axes.minorticks_off()
        axes.axhline(0, color=SOFT, linewidth=0.8, linestyle="--", zorder=0)
        axes.set_xlabel("m")
        axes.set_ylabel("leakage")
        axes.legend(frameon=False)
        return _svg(figure)


def scatter_plot(points: Points, x: str, y: str, lines: Mapping[str, Interval] | None = None) -> str:
    """Points with intervals both ways, each with its label beside it; lines across, each with its own."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(3.4)
        _scatter(axes, points, x, y, lines or {})
        _label(figure, axes, points)
        return _svg(figure)


def scatter_panels(panels: Sequence[Panel], legend: Sequence[str], kind: str) -> bytes:
    """Scatter plots side by side, two in a row, with a legend below, a line each; as `svg` or `png`."""
    with matplotlib.rc_context(STYLE):
        heights = [3.4] * -(-len(panels) // 2) + [0.2 * len(legend) + 0.1]  # inches
        figure = Figure(figsize=(2 * WIDTH, sum(heights)), layout="constrained")
        grid = figure.add_gridspec(len(heights), 2, height_ratios=heights)
        for place, panel in enumerate(panels):
            _scatter(_axes(figure, grid[place // 2, place % 2]), *panel)
        drawn = list(figure.axes)
        words = figure.add_subplot(grid[-1, :])
        words.axis("off")
        words.text(0, 1, "\n".join(legend), color=INK, fontsize=9, va="top", transform=words.transAxes)
        for axes, (points, *_) in zip(drawn, panels, strict=True):
            _label(figure, axes, points)
        if kind == "svg":
            return _svg(figure).encode()
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=150, metadata={"Software": None})
        return file.getvalue()


def _scatter(axes: Axes, points: Points, x: str, y: str, lines: Mapping[str, Interval]) -> None:
    for place, (across, up) in enumerate(points.values()):
        _point(axes, across, up, SERIES[place % len(SERIES)])
    axes.margins(0.12)
    for label, at in lines.items():
        axes.axhline(at.value, color=SOFT, linewidth=0.8, linestyle="--", zorder=0)
        end = axes.get_yaxis_transform()
        axes.annotate(label, (0.99, at.value), xycoords=end, ha="right", va="bottom", color=SOFT, fontsize=8)
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def _label(figure: Figure, axes: Axes, points: Points) -> None:
    """Each label as near to its point as it covers no point and no other text; a line leads to those farther off."""
    figure.draw_without_rendering()  # so that it is known where everything lies
    at = {label: (across.value, up.value) for label, (across, up) in points.items()}
    point = figure.dpi / 72  # pixels
    middles = [axes.transData.transform(place) for place in at.values()]
    dot = DOT * point
    taken = [text.get_window_extent() for text in axes.texts]
    taken += [Bbox.from_extents(x - dot, y - dot, x + dot, y + dot) for x, y in middles]
    for label, place in at.items():
        words = axes.annotate(label, place, (0, 0), textcoords="offset points", ha="center", va="center", color=INK)
        box = words.get_window_extent()
        for distance, turn in itertools.product(DISTANCES, range(DIRECTIONS)):
            angle = (2 * turn / DIRECTIONS + 0.25) * math.pi
            across = math.cos(angle) * (distance + box.width / 2 / point)
            up = math.sin(angle) * (distance + box.height / 2 / point)
            moved = box.translated(across * point, up * point)
            if Bbox.union([axes.bbox, moved]).bounds == axes.bbox.bounds and not moved.count_overlaps(taken):
                break
        taken.append(moved)
        words.set_position((across, up))
        if distance > DISTANCES[0]:
            line = {"arrowstyle": "-", "color": SOFT, "linewidth": 0.6, "shrinkA": 4, "shrinkB": 3}
            axes.annotate("", place, (across, up), textcoords="offset points", arrowprops=line)


def _figure(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, _axes(figure)


def _axes(figure: Figure, *place: SubplotSpec) -> Axes:
    axes = figure.add_subplot(*place)
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    return axes


def _point(axes: Axes, across: Interval, up: Interval, colour: str) -> None:
    axes.plot([across.low, across.high], [up.value, up.value], color=colour, linewidth=2, alpha=0.6)
    axes.plot([across.value, across.value], [up.low, up.high], color=colour, linewidth=2, alpha=0.6)
    axes.plot([across.value], [up.value], color=colour, marker="o", markersize=6)


def _svg(figure: Figure) -> str:
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return file.getvalue()
