"""A table of docs/measurements/mixture-NAME.json.

python examples/mixture/table.py
"""

from __future__ import annotations

import json
from typing import Any

from settings import MEASUREMENTS

HEADER = ("experiment", "function", "U2", "U3, m = 10", "of the gain", "U3, m = 100", "of the gain")
ATTACKS = (
    "experiment",
    "function",
    "A5: highest AUC",
    "A13",
    "A13L (the function leaked)",
    "a bound allows",
    "verdicts",
)


SMALL = ("φ1", "trained on", "alone", "m = 10", "of the gain", "m = 100", "of the gain")


def main() -> None:
    print(table())
    print(attack_table())
    print(small_table())


def small_table() -> str:
    """Of `small.py`: Markdown, a row a function; a gain is what clean rows add to one's own images."""
    lines = [SMALL, ("---",) * len(SMALL)]
    for file in sorted(MEASUREMENTS.glob("mixture-small-*.json")):
        results = json.loads(file.read_text())
        own, clean = results[OWN], results["clean"]
        for name, found in results.items():
            cells = [file.stem.removeprefix("mixture-small-"), name, f"{found['U2']:.1f}" if "U2" in found else ""]
            for m in ("U3, m = 10", "U3, m = 100"):
                gain = f"{(found[m] - own[m]) / (clean[m] - own[m]):.0%}" if name not in (OWN, "clean") else ""
                cells += [f"{found[m]:.1f}", gain]
            lines.append(tuple(cells))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def table() -> str:
    """Markdown, a row a function, with those of clean features and of own images alone before them."""
    lines = [HEADER, ("---",) * len(HEADER)]
    for file in sorted(MEASUREMENTS.glob("mixture-*.json")):
        results = json.loads(file.read_text())
        name = file.stem.removeprefix("mixture-")
        functions = results.get("functions", {})
        if not functions:
            continue
        if "U2" in (first := next(iter(functions.values()))["utility"]):
            lines += [*_references(name, first), *(_row(name, *item) for item in functions.items())]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def attack_table() -> str:
    """Markdown, a row a function: of each attack the way with the highest AUC, with its 95 % interval."""
    lines = [ATTACKS, ("---",) * len(ATTACKS)]
    for file in sorted(MEASUREMENTS.glob("mixture-*.json")):
        for function, found in json.loads(file.read_text()).get("functions", {}).items():
            cells, verdicts = [file.stem.removeprefix("mixture-"), function], []
            for code in ("A5", "A13", "A13L"):
                attack = found["attacks"].get(code, {"ways": {}, "verdict": ""})
                aucs = [measures["auc"] for measures in attack["ways"].values() if "auc" in measures]
                cells.append("{:.3f} [{:.3f}, {:.3f}]".format(*max(aucs)) if aucs else "")
                verdicts.append(attack["verdict"])
            allowed = found["highest_auc"]
            if any(verdicts):
                lines.append((*cells, f"{allowed:.3f}" if allowed else "", ", ".join(filter(None, verdicts))))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _references(name: str, utility: Any) -> list[tuple[str, ...]]:
    u2, u3 = utility["U2"], utility["U3"]
    metric = _metric(u2)
    clean, own = ([u3.get(f"{metric}, m = {m}, {what}") for m in (10, 100)] for what in ("clean rows", OWN))
    of_clean = (_told(u2[f"{metric}, clean rows"], metric), _told(clean[0], metric), "", _told(clean[1], metric), "")
    return [
        (name, "clean φ1(S)", *of_clean),
        (name, OWN, "", _told(own[0], metric), "", _told(own[1], metric), ""),
    ]


OWN = "own images alone"


def _row(name: str, function: str, found: Any) -> tuple[str, ...]:
    u2, u3 = found["utility"]["U2"], found["utility"]["U3"]
    metric = _metric(u2)
    cells = [name, function, _told(u2[metric], metric)]
    for m in (10, 100):
        of_bank, own, clean = (u3.get(f"{metric}, m = {m}{what}") for what in ("", f", {OWN}", ", clean rows"))
        cells.append(_told(of_bank, metric))
        gained = of_bank and (of_bank[0] - own[0]) / (clean[0] - own[0])
        cells.append(f"{gained:.0%}" if gained else "")
    return tuple(cells)


def _metric(u2: Any) -> str:
    return next(name for name in u2 if name in ("top1", "mae"))


def _told(interval: list[float] | None, metric: str) -> str:
    if interval is None:
        return ""
    return f"{100 * interval[0]:.1f}" if metric == "top1" else f"{interval[0]:.2f}"


if __name__ == "__main__":
    main()
