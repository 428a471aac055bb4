"""The attack battery on the functions of `run.py`, and the tables of docs/attacks-cifar10.md.

    python examples/cifar10/attack.py --project /tmp/cifar10 --profile standard --out docs/attacks-cifar10

Every step is the command that an owner would type; a run that was cut off goes on. The numbers of each function go into
`--out` as soon as they are there: numbers only, no picture.

`--same-categories` gives the attacker pictures of S's own classes instead, those of its test split, which is in no
bank. A5 and A10 are left out then: that split is what they tell from S. The vault's report of this profile is replaced:
run it last.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

from dpf_release.attacks.interface import registered
from dpf_release.evaluation.profiles import PROFILES
from dpf_release.evaluation.report.headline import strongest
from dpf_release.release.attack_report import AttackReport, Interval, public_report

FUNCTIONS = ("equivalence", "recombine-20", "paper")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--project", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--profile", default="standard")
    parser.add_argument("--functions", nargs="+", default=FUNCTIONS)
    parser.add_argument("--only", help="codes of attacks, as A7,A9; default: all of the profile")
    parser.add_argument("--images", type=int, help="that a training is shown, in the place of the profile's")
    parser.add_argument("--beside", type=Path, help="--out of another measurement: ends with both in one table")
    parser.add_argument("--same-categories", action="store_true", help="Q has the classes of S")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    config, only, suffix = options.project / "dpf.toml", options.only, options.profile
    if options.same_categories:
        config, suffix = with_public_images_of_the_same_categories(config), f"{options.profile}-same-categories"
        codes = [attack.code for attack in registered() if PROFILES[options.profile].runs(attack)]
        only = ",".join(code for code in (only.split(",") if only else codes) if code not in ("A5", "A10"))
    part = (["--only", only] if only else []) + (["--images", str(options.images)] if options.images else [])
    for name in options.functions:
        command = ["attack", "--name", name, "--profile", options.profile, *part, "--config", str(config)]
        print(f"\n$ dpf-release {' '.join(command)}", flush=True)
        subprocess.run([sys.executable, "-m", "dpf_release", *command], check=True)
        path = options.project / "vault" / "reports" / name / f"attack-{options.profile}.json"
        report = public_report(AttackReport.model_validate_json(path.read_bytes()))  # tables say what the JSON says
        (options.out / f"{name}-{suffix}.json").write_text(report.as_json() + "\n")
        text = f"### {name}, profile {suffix}\n\n{tables(report)}\n\n{power_table(report)}\n"
        (options.out / f"{name}-{suffix}.md").write_text(text)
        print(text, flush=True)
        if options.beside:
            (options.out / "beside.md").write_text(table := beside(options.beside, options.out, suffix))
            print(table, flush=True)


def beside(before: Path, now: Path, suffix: str) -> str:
    """What two measurements have of the same attacks on functions of the same names, as Markdown."""
    lines = [
        "| function | attack | baseline, before | now | leakage, before | now | re-identification, before | now |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for path in sorted(now.glob(f"*-{suffix}.json")):
        found = {}
        for folder in (before, now):
            report = AttackReport.model_validate_json((folder / path.name).read_bytes())
            found[folder] = {result.code: result for result in report.attacks}
        for code in [code for code in found[before] if code in found[now]]:
            pair = [found[folder][code] for folder in (before, now)]
            baselines = [f"{result.baseline:.3f}" for result in pair if result.baseline is not None]
            leakages = [shown(result.leakage) for result in pair]
            shares = ["" if code == "A10" else shown(result.re_identification, share=True) for result in pair]
            name = path.name.removesuffix(f"-{suffix}.json")
            lines.append(f"| {' | '.join([name, code, *baselines, *leakages, *shares])} |")
    return "\n".join(lines) + "\n"


def with_public_images_of_the_same_categories(config: Path) -> Path:
    """The same project with another Q: the pictures of `test` that have S's classes."""
    text = config.read_text()
    private = tomllib.loads(text)["images"]["private"]
    path, classes = json.dumps(f"{private['path']}/test"), json.dumps(private["classes"])
    text, found = re.subn(
        r"(\[images\.public\]\n).*?\n\n",
        lambda section: f"{section[1]}path = {path}\nclasses = {classes}\n\n",
        text,
        flags=re.DOTALL,
    )
    if found != 1:
        raise SystemExit(f"expected one section [images.public] in {config}, found {found}")
    changed = config.with_name("dpf-same-categories.toml")
    changed.write_text(text)
    return changed


def tables(report: AttackReport) -> str:
    """One function's attacks, what each attack did to planted functions, and utilities, as Markdown."""
    columns = (
        "attack, baseline, strongest way, ceiling, leakage [95 %], re-identification [95 %], plain SSIM, power, verdict"
    )
    lines = ["| " + columns.replace(", ", " | ") + " |", "|---" * 9 + "|"]
    for result in report.attacks:
        best = strongest(result)
        plain = best and result.ways[best.way].measures.get("ssim")
        cells = [
            f"{result.code} {result.title}",
            "" if result.baseline is None else f"{result.baseline:.3f}",
            f"{shown(best.found)}, {best.way}" if best else "",
            "" if result.ceiling is None else f"{result.ceiling:.3f}",
            shown(result.leakage),
            shown(result.re_identification, share=True),
            f"{plain.value:.3f}" if plain else "",
            {True: "yes", False: "no", None: "none"}[result.power.passed],
            result.verdict,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [f"| {code} | not applicable |" + " |" * 7 for code in sorted(report.not_applicable)]
    lines += ["", "| reference | affine-fit SSIM |", "|---|---|"]
    lines += [f"| {name} | {shown(found)} |" for name, found in {**report.baselines, **report.references}.items()]
    for result in report.attacks:
        for name, values in result.series.items():
            ordered = sorted(values.items(), key=lambda item: int(item[0]))
            told = ", ".join(f"{number}: {shown(found)}" for number, found in ordered)
            lines += ["", f"{result.code}, leakage against the number of {name}: {told}."]
    lines += ["", "| utility | value [lowest, highest seed; of U1 95 %] |", "|---|---|"]
    for code, utility in report.utility.items():
        lines += [f"| {code} {name} | {shown(found)} |" for name, found in utility.ordered.items()]
    lines += ["", *(f"- {result.code}: {'; '.join(result.reasons)}" for result in report.attacks if result.reasons)]
    return "\n".join(lines)


def power_table(report: AttackReport) -> str:
    """What each attack got out of the weak functions that it must break, as Markdown."""
    lines = ["| attack | planted | leakage [95 %] |", "|---|---|---|"]
    for result in report.attacks:
        for name, found in result.power.planted.items():
            other = result.power.surpassed.get(name)
            beside = f"; what it must surpass: {shown(other)}" if other else ""
            lines.append(f"| {result.code} | {name} | {shown(found)}{beside} |")
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
