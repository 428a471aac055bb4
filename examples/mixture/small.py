"""What drawn rows are worth to a small classifier: docs/measurements/mixture-small-NAME.json, in minutes on two cores.

    python examples/mixture/small.py --config /tmp/mixture/pretrained/dpf.toml --name pretrained

The project is one of `run.py`, with its features. U2 and U3 of `dpf-release attack` train φ2's own architecture three
times, which takes hours for a MobileNetV2; here it is three layers, once. U2: trained on drawn rows alone. U3: with m
images of one's own a class, which are half of S test; the other half judges both.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
from choices import accuracy
from numpy.typing import NDArray
from settings import FUNCTIONS, MEASUREMENTS

from dpf_release import Project, featurize, fit_poison
from dpf_release.bank.reader import FeatureBank
from dpf_release.owner.fitted import load_function

EPOCHS, OWN = 4, (10, 100)
LEAST_STEPS = 600  # of a classifier of few rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--name", required=True)
    options = parser.parse_args()
    file = MEASUREMENTS / f"mixture-small-{options.name}.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    project = Project.open(options.config)
    featurize(project)
    with project.working():
        banks = {split: _all(project.private_bank(split)) for split in ("train", "test")}
    own, judges = _halves(banks["test"][1])
    test = banks["test"][0][judges], banks["test"][1][judges]

    def measure(name: str, features: NDArray[np.float16], labels: NDArray[np.int64]) -> None:
        if name in results:
            return
        results[name] = found = {}
        if len(labels):
            found["U2"] = _score(features, labels, *test)
        for m in OWN:
            mine = np.concatenate([some[:m] for some in own])
            joined = np.concatenate([features, banks["test"][0][mine]])
            found[f"U3, m = {m}"] = _score(joined, np.concatenate([labels, banks["test"][1][mine]]), *test)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
        print(f"{name}: {found}", flush=True)

    measure("own images alone", banks["train"][0][:0], banks["train"][1][:0])
    measure("clean", *banks["train"])
    for number, (name, function) in enumerate(FUNCTIONS.items()):
        if name not in results:
            started, kept = time.monotonic(), f"small-{number}"
            fit_poison(project, name=kept, function=function)
            fitted = load_function(project, kept)
            with project.working():
                rows = fitted.chain.on(project.private_bank("train"), fitted.plans["train"])
                features = [rows.read(some) for some in np.array_split(np.arange(len(rows)), 20)]
            print(f"{name}: fitted and drawn in {time.monotonic() - started:.0f} s", flush=True)
            measure(name, np.concatenate(features).astype(np.float16), rows.targets)
    for name in FUNCTIONS:
        for m in OWN:
            alone, of, clean = (results[which][f"U3, m = {m}"] for which in ("own images alone", name, "clean"))
            print(f"{name}, m = {m}: {(of - alone) / (clean - alone):.0%} of what clean features add")


def _all(bank: FeatureBank) -> tuple[NDArray[np.float16], NDArray[np.int64]]:
    return np.concatenate([features for _, features in bank.batches(2000)]), np.asarray(bank.targets)


def _halves(labels: NDArray[np.int64]) -> tuple[list[NDArray[np.int64]], NDArray[np.int64]]:
    """Rows of each class that are one's own, and those of all classes that judge."""
    generator = np.random.default_rng(0)
    rows = [generator.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)]
    return [of[: len(of) // 2] for of in rows], np.concatenate([of[len(of) // 2 :] for of in rows])


def _score(
    features: NDArray[np.float16],
    labels: NDArray[np.int64],
    test: NDArray[np.float16],
    wanted: NDArray[np.int64],
) -> float:
    batch = min(128, max(10, len(labels) // 10))
    epochs = max(EPOCHS, LEAST_STEPS // (len(labels) // batch))
    return round(100 * accuracy(features, labels, test, wanted, epochs, seed=0, batch=batch), 1)


if __name__ == "__main__":
    main()
