"""LFW: a release of yaw that hides who it is, and the table of docs/lfw.md.

    python examples/lfw/run.py --images lfw112 --out /tmp/lfw

`--images` is a folder with labels.csv (path, identity, yaw_deg, ...) and images/. S: persons with 5 or more images, at
most 50 each, split within persons. Q: persons with one or two. Ends with table.md in the project's folder: no face.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np

from dpf_release.owner.init import init

HERE = Path(__file__).parent
MOST_OF_A_PERSON = 50
HELD_OUT = 0.15  # share of each person's images in `val`, and in `test`
NAME = "identity-confusion"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    config = options.out / "dpf.toml"
    if not config.exists():
        init(options.out)
        (options.out / "images").symlink_to((options.images / "images").resolve())
        write_tables(options.images / "labels.csv", options.out)
    started = time.monotonic()

    def step(*command: str) -> None:
        print(f"\n$ dpf-release {' '.join(command)}", flush=True)
        subprocess.run([sys.executable, "-m", "dpf_release", *command, "--config", str(config)], check=True)

    config.write_text((HERE / "dpf.toml").read_text())
    vault = options.out / "vault"
    if not (vault / "network" / "network.json").exists():
        step("train")
    step("featurize")
    function = vault / "functions" / NAME / "function.json"
    if not function.exists() or not json.loads(function.read_text())["fitted"]:
        step("fit-poison", "--name", NAME)
    step("poison", "--name", NAME)
    step("package", "--name", NAME)
    report = json.loads((vault / "reports" / NAME / "measurements.json").read_text())
    lines = [
        "| split | rows | MAE clean | MAE poisoned | identity clean | poisoned | persons, rows |",
        "|---|---|---|---|---|---|---|",
    ]
    for split in ("val", "test"):
        task, who = report[split]["task"], report[split]["attributes"]["identity"]
        lines.append(
            f"| {split} | {report[split]['rows']} | {task['mae_clean']:.2f}° | {task['mae_poisoned']:.2f}° "
            f"| {who['top1_clean']:.1%} | {who['top1_poisoned']:.1%} | {who['values']}, {who['rows']} |"
        )
    lines += ["", f"{(time.monotonic() - started) / 60:.1f} minutes."]
    (options.out / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def write_tables(labels: Path, out: Path) -> None:
    """private.csv (path, identity, yaw_deg, split) and public.csv (path)."""
    people = defaultdict(list)
    with labels.open(newline="") as file:
        for row in csv.DictReader(file):
            people[row["identity"]].append(row)
    generator = np.random.default_rng(0)
    private, public = [], []
    for person, rows in sorted(people.items()):
        if len(rows) <= 2:
            public += [{"path": f"images/{row['path']}"} for row in rows]
        if len(rows) < 5:
            continue
        usable = [row for row in rows if row["yaw_deg"]]  # eight images of the set have no pseudo-label
        chosen = [usable[place] for place in generator.permutation(len(usable))[:MOST_OF_A_PERSON]]
        held_out = max(1, round(HELD_OUT * len(chosen)))
        for number, row in enumerate(chosen):
            split = "test" if number < held_out else "val" if number < 2 * held_out else "train"
            line = {"path": f"images/{row['path']}", "identity": person, "yaw_deg": row["yaw_deg"], "split": split}
            private.append(line)
    for name, lines in (("private.csv", private), ("public.csv", public)):
        with (out / name).open("w", newline="") as file:
            table = csv.DictWriter(file, list(lines[0]))
            table.writeheader()
            table.writerows(lines)


if __name__ == "__main__":
    main()
