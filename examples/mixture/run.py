"""What rows drawn by `mixture` are worth, and what they give away: docs/measurements/mixture-NAME.json.

    python examples/mixture/run.py public-featurizer --images cifar10 --out /tmp/mixture
    python examples/mixture/run.py large --out /tmp/mixture

`cifar10`: φ1 and φ2 trained on S. `public-featurizer`: φ1 trained on Q, φ2 from the bank, so that the bound holds for
what is published. `large`: seconds and memory of a fit at 1024×14×14. `--images` is a folder train/CLASS/*.jpg,
test/CLASS/*.jpg. What is done already is not done again: a run that was cut off goes on.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpf_release import Project, attack, featurize, fit_poison, init, poison, train
from dpf_release.bank.rows import ComputedRows
from dpf_release.models.training import Recipe
from dpf_release.poisoning.chain import build_chain, fit_chain
from dpf_release.poisoning.context import Material, Split
from dpf_release.poisoning.objective import Adversaries, TaskLoss
from dpf_release.poisoning.plan import FeatureSpec

CIFAR10 = Path(__file__).parents[1] / "cifar10" / "dpf.toml"
MEASUREMENTS = Path(__file__).parents[2] / "docs" / "measurements"
DELTA = 4e-6  # below 1 / (10 · 22,500 images)
FUNCTIONS = {
    "epsilon 1": f"mixture:epsilon=1,delta={DELTA}",
    "epsilon 4": f"mixture:epsilon=4,delta={DELTA}",
    "no bound, 8 groups": "mixture:epsilon=inf,groups=8",
}
MEASURED = ["U1", "U2", "U3", "A5", "A13", "A13L"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=["cifar10", "public-featurizer", "large"])
    parser.add_argument("--images", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, help="of the network, where fewer have to do")
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
    if not vault.holds(vault.network / "network.json"):
        results["network"] = train(project, epochs=options.epochs).scores
        results["epochs"] = options.epochs or project.config.train.epochs
        keep()
    featurize(project)
    for number, (name, function) in enumerate(FUNCTIONS.items()):
        if name in results.get("functions", {}):
            continue
        started, kept = time.monotonic(), f"mixture-{number}"
        if not vault.holds(vault.function(kept) / "candidate.json"):
            facts = fit_poison(project, name=kept, function=function).last
            seconds = time.monotonic() - started
            poison(project, name=kept)
            results.setdefault("fits", {})[name] = {**facts, "seconds": round(seconds, 1)}
        report = attack(project, name=kept, profile="standard", only=options.only)
        results.setdefault("functions", {})[name] = {
            "utility": {code: _rounded(of.measures) for code, of in report.utility.items()},
            "attacks": {
                of.code: {
                    "verdict": of.verdict,
                    "reasons": list(of.reasons),
                    "ways": {way: _rounded(found.measures) for way, found in of.ways.items()},
                }
                for of in report.attacks
            },
            "not_applicable": dict(report.not_applicable),
        }
        keep()


def _rounded(measures: Any) -> dict[str, list[float]]:
    return {name: [round(of.value, 4), round(of.low, 4), round(of.high, 4)] for name, of in measures.items()}


def configured(options: argparse.Namespace) -> Path:
    """The configuration of an experiment; written where it is not there."""
    folder = options.out / options.name
    config = folder / "dpf.toml"
    if not config.exists():
        init(folder)
        text = CIFAR10.read_text().replace("IMAGES", str(options.images.resolve()))
        if options.name != "cifar10":
            text = text.replace("[model]\n", '[model]\ntrain_on = "public"\nclassifier = "from-bank"\n')
        config.write_text(text)
    return config


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
