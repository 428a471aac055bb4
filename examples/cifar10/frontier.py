"""Privacy against utility on CIFAR-10: fits the functions that are missing, then `dpf-release compare` on all.

    python examples/cifar10/frontier.py --project /tmp/cifar10 --out docs/frontier-cifar10

`--project` is the folder that `run.py` made. What is fitted there already is taken as it is; of what is missing, the
learned functions get short recipes (below). A run that was cut off goes on. `--out` gets frontier.json, frontier.svg
and table.md: numbers only, no picture.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from dpf_release.evaluation.report.frontier_points import Frontier
from dpf_release.release.attack_report import Interval

SHORT = ["--epochs", "4"]  # of a learned function that `run.py` does not fit: it has 10
FUNCTIONS = {
    "identity": ["--function", "identity"],
    "class-gaussian": ["--function", "class-gaussian"],
    "equivalence": ["--function", "dpf"],
    "equivalence-0.1": ["--function", "dpf", "--lambda", "0.1", *SHORT],
    "equivalence-10": ["--function", "dpf", "--lambda", "10", *SHORT],
    "paper": ["--function", "dpf", "--objective", "paper"],
    "gaussian-noise": ["--function", "gaussian-noise"],
    "gaussian-filter": ["--function", "gaussian-filter"],
    "mean-filter": ["--function", "mean-filter"],
    "gaussian-noise-dpf": ["--function", "gaussian-noise+dpf", *SHORT],
    "gaussian-filter-dpf": ["--function", "gaussian-filter+dpf", *SHORT],
    "mean-filter-dpf": ["--function", "mean-filter+dpf", *SHORT],
    "recombine-5": ["--function", "recombine:k=5"],
    "recombine-20": ["--function", "recombine:k=20"],
    "recombine-100": ["--function", "recombine:k=100"],
    "recombine-20-dpf": ["--function", "recombine:k=20+dpf", *SHORT],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--project", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--profile", default="quick")
    parser.add_argument("--functions", nargs="+", default=list(FUNCTIONS), choices=list(FUNCTIONS))
    parser.add_argument("--budget", help="minutes of training for the attacks on each function")
    options = parser.parse_args()
    vault = options.project / "vault"
    config = ["--config", str(options.project / "dpf.toml")]
    for name in options.functions:
        if not _is_fitted(vault / "functions" / name / "function.json"):
            step("fit-poison", "--name", name, *FUNCTIONS[name], *config)
        if not (vault / "reports" / name / "measurements.json").exists():
            step("poison", "--name", name, *config)
    budget = ["--budget", options.budget] if options.budget else []
    step("compare", *options.functions, "--profile", options.profile, *budget, *config)
    frontier = json.loads((vault / "reports" / "frontier.json").read_text())
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "frontier.json").write_text(json.dumps(frontier, indent=2, sort_keys=True) + "\n")
    (options.out / "frontier.svg").write_bytes((vault / "reports" / "frontier.svg").read_bytes())
    (options.out / "table.md").write_text(table(Frontier.model_validate(frontier)))
    print((options.out / "table.md").read_text())


def step(*command: str) -> None:
    """One command of the owner's."""
    print(f"\n$ dpf-release {' '.join(command)}", flush=True)
    subprocess.run([sys.executable, "-m", "dpf_release", *command], check=True)


def _is_fitted(record: Path) -> bool:
    return record.exists() and json.loads(record.read_text())["fitted"]


def table(frontier: Frontier) -> str:
    """The points as Markdown."""
    lines = [
        "| function | ε | leakage [95 %] | A5 top-1 [95 %] | own images | the bank adds | clean rows add |",
        "|" + "---|" * 7,
    ]
    for point in frontier.points:
        bound = "none" if point.epsilon is None else f"{point.epsilon:g}"
        found = [*map(shown, (point.privacy, point.linkage)), point.m, *map(shown, (point.gain, point.gain_of_clean))]
        lines.append(f"| {' | '.join([point.name, bound, *found])} |")
    return "\n".join(lines) + "\n"


def shown(found: Interval | None) -> str:
    """A value with its interval, where it has one."""
    if found is None:
        return "not defined"
    return f"{found.value:.3f}" + (f" [{found.low:.3f}, {found.high:.3f}]" if found.low < found.high else "")


if __name__ == "__main__":
    main()
