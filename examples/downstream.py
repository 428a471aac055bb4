"""What a downstream user does with a release: a new classifier on it, φ2 refined, and classes of their own beside it.

    python examples/downstream.py --release release --images mine --other others

`--images` is a tree train/CLASS/*.jpg, test/CLASS/*.jpg of your own images with the release's classes, `--other` one
with other classes; `test` judges. docs/downstream.md tells more.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from torch import nn, optim

from dpf_release import Release, concat
from dpf_release.bank.dataset import BankDataset
from dpf_release.poisoning.mixture import Draw
from dpf_release.release.featurize import featurize_new
from dpf_release.release.train import fit_classifier, score


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--release", type=Path, required=True)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--other", type=Path)
    parser.add_argument("--epochs", type=int, default=8)
    options = parser.parse_args()

    release = Release.open(options.release)  # raises where a file is not what the manifest says
    bank = release.bank("train")
    with tempfile.TemporaryDirectory() as folder:
        featurize_new(release, options.images, Path(folder) / "bank")  # φ1(T): yours, unpoisoned
        own, test = (BankDataset.open(Path(folder) / "bank", split, release.names) for split in ("train", "test"))
        print(f"{len(bank)} released rows, {len(own)} own, {len(test)} own test rows")
        print(f"φ2 as released: {score(release.classifier(), test):.4f}")

        phi_3 = release.untrained_classifier()
        fit_classifier(phi_3, bank, epochs=options.epochs, learning_rate=0.05)
        print(f"φ3, new, trained on the release alone: {score(phi_3, test):.4f}")

        pupil = learn_from(release.classifier(), release.untrained_classifier(), bank, options.epochs)
        print(f"the same, trained on φ2's answers to the released rows (φ2's knowledge): {score(pupil, test):.4f}")

        alone = release.untrained_classifier()
        fit_classifier(alone, own, epochs=options.epochs, learning_rate=0.05)
        print(f"the same, trained on the own images alone: {score(alone, test):.4f}")

        phi_2 = release.classifier()
        fit_classifier(phi_2, concat([bank, own]), epochs=options.epochs, learning_rate=0.005)
        print(f"φ2 refined on release and own images: {score(phi_2, test):.4f}")

        if options.other:
            beside_other_classes(release, options.other, test, Path(folder), options.epochs)


def learn_from(teacher: nn.Module, pupil: nn.Module, bank: BankDataset, epochs: int) -> nn.Module:
    """A classifier that learns another's soft answers on a bank."""
    optimizer = optim.SGD(pupil.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
    loader = bank.loader(batch_size=128, shuffle=True)
    for _ in range(epochs):
        for features, _ in loader:
            answers = F.softmax(teacher(features.float()).detach(), dim=1)
            loss = F.cross_entropy(pupil(features.float()), answers)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return pupil


def beside_other_classes(release: Release, images: Path, test: BankDataset, folder: Path, epochs: int) -> None:
    """One classifier for the release's classes and others: where rows were drawn, on both sides, and the wrong way."""
    names = sorted(path.name for path in (images / "train").iterdir())
    featurize_new(release, images, folder / "real", own_classes=True)
    real, judge = (BankDataset.open(folder / "real", split, names) for split in ("train", "test"))
    sides = {"as they are": real}
    if release.index.drawn:
        featurize_new(release, images, folder / "drawn", own_classes=True, draw=Draw(seed=0))
        sides = {"drawn too": BankDataset.open(folder / "drawn", "train", names), "real (the wrong way)": real}
    for how, others in sides.items():
        both = concat([release.bank("train"), others], allow_shortcut=True)  # without it, the wrong way is refused
        classifier = release.untrained_classifier(outputs=len(both.names))
        fit_classifier(classifier, both, epochs=epochs, learning_rate=0.05)
        of_release, of_others = (score(classifier, renumbered(rows, both.names)) for rows in (test, judge))
        print(f"other classes {how}: {of_release:.4f} on the release's classes, {of_others:.4f} on the others")


def renumbered(rows: BankDataset, names: Sequence[str]) -> BankDataset:
    """The same rows, their classes numbered as in `names`."""
    numbers = np.array([names.index(name) for name in rows.names])
    return BankDataset(rows.banks, names, [numbers[rows.targets]])


if __name__ == "__main__":
    main()
