"""What a downstream user does with a release: a new classifier on it, and φ2 refined with images of their own.

    python examples/downstream.py --release release --images mine

`--images` is a tree train/CLASS/*.jpg, test/CLASS/*.jpg of your own images T with the release's classes; `test` judges.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from dpf_release import Release, concat
from dpf_release.bank.dataset import BankDataset
from dpf_release.release.featurize import featurize_new
from dpf_release.release.train import fit_classifier, score


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--release", type=Path, required=True)
    parser.add_argument("--images", type=Path, required=True)
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

        alone = release.untrained_classifier()
        fit_classifier(alone, own, epochs=options.epochs, learning_rate=0.05)
        print(f"the same, trained on the own images alone: {score(alone, test):.4f}")

        phi_2 = release.classifier()
        fit_classifier(phi_2, concat([bank, own]), epochs=options.epochs, learning_rate=0.005)
        print(f"φ2 refined on release and own images: {score(phi_2, test):.4f}")


if __name__ == "__main__":
    main()
