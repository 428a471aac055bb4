"""The attack battery on the functions of `run.py`, and the table of docs/attacks-cifar10.md.

    python examples/cifar10/attack.py --project /tmp/cifar10 --profile standard --out docs/attacks-cifar10

Every step is the command that an owner would type; a run that was cut off goes on. The numbers of each function go into
`--out` as soon as they are there: numbers only, no picture.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from dpf_release.attack_report import AttackReport, Interval, public_report

FUNCTIONS = ("equivalence", "recombine-20", "paper")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--project", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--profile", default="standard")
    parser.add_argument("--functions", nargs="+", default=FUNCTIONS)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.functions:
        command = [
            "attack",
            "--name",
            name,
            "--profile",
            options.profile,
            "--config",
            str(options.project / "dpf.toml"),
        ]
        print(f"\n$ dpf-release {' '.join(command)}", flush=True)
        subprocess.run([sys.executable, "-m", "dpf_release", *command], check=True)
        path = options.project / "vault" / "reports" / name / f"attack-{options.profile}.json"
        report = AttackReport.model_validate_json(path.read_bytes())
        (options.out / f"{name}-{options.profile}.json").write_text(public_report(report).as_json() + "\n")
        print(f"### {name}, profile {options.profile}\n\n{table(report)}", flush=True)


def table(report: AttackReport) -> str:
    """One function's attacks, as Markdown."""
    lines = [
        "| attack | baseline | best way | ceiling | leakage [95 %] | re-identification [95 %] | power | verdict |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in report.attacks:
        best = max(result.ways.items(), key=lambda item: item[1].leakage.value if item[1].leakage else 0.0)
        measure = best[1].measures.get("affine_ssim") or best[1].measures.get("top1")
        power = {True: "yes", False: "no", None: "none"}[result.power.passed]
        cells = [
            f"{result.code} {result.title}",
            "" if result.baseline is None else f"{result.baseline:.3f}",
            f"{shown(measure)}, {best[0]}",
            "" if result.ceiling is None else f"{result.ceiling:.3f}",
            shown(result.leakage),
            shown(result.re_identification, share=True),
            power,
            result.verdict,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def shown(interval: Interval | None, share: bool = False) -> str:
    """A value with its interval; a share in percent."""
    if interval is None:
        return "not defined"
    scale, unit = (100, " %") if share else (1, "")
    digits = 1 if share else 3
    value, low, high = (f"{scale * number:.{digits}f}" for number in (interval.value, interval.low, interval.high))
    return f"{value}{unit} [{low}, {high}]"


if __name__ == "__main__":
    main()
