"""docs/reconstructions.png: pictures, what is made of their features, and what the best attackers make of releases.

    python examples/cifar10/picture.py --project /tmp/cifar10 --functions paper mixture --out docs/reconstructions.png

Of each function the attack with the highest leakage in its last report, by its strongest way, as the owner's page shows
it. An owner never publishes these: they show private images. Here S is CIFAR-10, which is public.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from torch import Tensor

from dpf_release.evaluation.gallery import read_pictures
from dpf_release.images.grid import draw_grid
from dpf_release.owner.project import Project
from dpf_release.release.attack_report import AttackReport


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--project", type=Path, required=True)
    parser.add_argument("--functions", nargs="+", required=True, help="names under which they were fitted and attacked")
    parser.add_argument("--profile", default="standard")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    project, rows = Project.open(options.project / "dpf.toml"), dict[str, Tensor]()
    for name in options.functions:
        path = project.vault.reports(name) / f"attack-{options.profile}.json"
        report = AttackReport.model_validate_json(path.read_bytes())
        kept = read_pictures(project.vault, name, report)
        leakages = {of.code: of.leakage.value for of in report.attacks if f"{of.code}/attack" in kept and of.leakage}
        best = max(leakages, key=lambda code: leakages[code])
        print(f"{name}: {best}, leakage {leakages[best]:.3f}")
        for row, key in (("original", "original"), ("φ1(x)", "clean"), (name, "attack")):
            rows.setdefault(row, kept[f"{best}/{key}"].float() / 255)
    options.out.write_bytes(draw_grid(rows))
    options.out.chmod(0o644)


if __name__ == "__main__":
    main()
