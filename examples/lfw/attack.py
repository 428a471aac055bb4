"""LFW: who can be found in a release of head poses, and the table of docs/attacks-lfw.md.

    python examples/lfw/attack.py --images lfw112 --out /tmp/lfw

In the folder of `run.py` it takes over the network and the function that are there. Functions: `equivalence`, which
knows nothing of identity; identity confusion (paper, section 4.4); recombined rows. Attacks: A5 for someone who holds a
photograph, A8 for someone who knows half of the rows of each person. Ends with attacks.md, and the numbers
as `package` would publish them: no face.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from run import HERE, NAME, write_tables

from dpf_release.owner.init import init
from dpf_release.release.attack_report import AttackReport, AttackResult, public_report

# Name → the function, and what it confuses.
FUNCTIONS = {
    "equivalence": ("dpf", []),
    NAME: ("dpf", ["identity"]),
    "recombine-5": ("recombine:k=5", []),
    "recombine-20": ("recombine:k=20", []),
}
STRAW_MAN = "px2s2"  # of `equivalence`, which has nothing else to work against


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--profile", default="standard")
    parser.add_argument("--budget", help="minutes of training for each function")
    parser.add_argument("--functions", default=",".join(FUNCTIONS))
    options = parser.parse_args()
    config, vault = options.out / "dpf.toml", options.out / "vault"
    if not config.exists():
        init(options.out)
        (options.out / "images").symlink_to((options.images / "images").resolve())
        write_tables(options.images / "labels.csv", options.out)

    def step(*command: str) -> None:
        print(f"\n$ dpf-release {' '.join(command)}", flush=True)
        subprocess.run([sys.executable, "-m", "dpf_release", *command, "--config", str(config)], check=True)

    reports: dict[str, AttackReport] = {}
    for name in options.functions.split(","):
        config.write_text(configuration(*FUNCTIONS[name]))
        if not (vault / "network" / "network.json").exists():
            step("train")
        step("featurize")
        function = vault / "functions" / name / "function.json"
        if not function.exists() or not json.loads(function.read_text())["fitted"]:
            step("fit-poison", "--name", name)
        step("poison", "--name", name)
        budget = ["--budget", options.budget] if options.budget else []
        step("attack", "--name", name, "--profile", options.profile, "--only", "A5,A8", *budget)
        path = vault / "reports" / name / f"attack-{options.profile}.json"
        reports[name] = public_report(AttackReport.model_validate_json(path.read_bytes()))
        (options.out / f"{name}-{options.profile}.json").write_text(reports[name].as_json() + "\n")
        (options.out / "attacks.md").write_text(table(reports))
    print(table(reports))


def configuration(function: str, confuse: list[str]) -> str:
    """The dpf.toml of `run.py` with another function, and the claim that A8 is about."""
    text = (HERE / "dpf.toml").read_text()
    text = text.replace('confuse = ["identity"]', f'confuse = {json.dumps(confuse)}\nfunction = "{function}"')
    if function == "dpf" and not confuse:
        text = text.replace("straw_men = []", f'straw_men = ["{STRAW_MAN}"]')
    return text + 'attribute = "identity"\n'  # its last section is [claims]


def table(reports: Mapping[str, AttackReport]) -> str:
    """One line a function; of each measure the attack's strongest way."""
    lines = [
        "| function | A5 top-1 | among | persons linked | membership AUC | TPR at 1 % FPR | A8 rank-1 "
        "| balanced accuracy | from the label | on clean rows |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, report in reports.items():
        found = {result.code: result for result in report.attacks}
        linkage, identity = found["A5"], found["A8"]
        cells = [highest(linkage, key) for key in ("top1", "persons", "auc", "tpr_at_1_percent")]
        cells.insert(1, str(linkage.among))
        cells += [highest(identity, key) for key in ("rank1", "accuracy")]
        cells += ["" if value is None else f"{value:.1%}" for value in (identity.baseline, identity.ceiling)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def highest(result: AttackResult, measure: str) -> str:
    """The highest of a measure over an attack's ways, with its interval."""
    found = [way.measures[measure] for way in result.ways.values() if measure in way.measures]
    if not found:
        return ""
    best = max(found, key=lambda interval: interval.value)
    form = "{:.2f}" if measure == "auc" else "{:.1%}"
    value, low, high = (form.format(number) for number in (best.value, best.low, best.high))
    return f"{value} [{low}, {high}]"


if __name__ == "__main__":
    main()
