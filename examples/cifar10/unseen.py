"""Reconstructors that P never saw, on a candidate of `run.py`: SSIM and L1 against the originals, clean and poisoned.

    python examples/cifar10/unseen.py --project /tmp/cifar10 --reconstructor rx2s2-c

Trains the reconstructor on Q first, as `fit-poison` trains a straw man.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from dpf_release.bank.reader import FeatureBank
from dpf_release.models.metrics import l1, ssim
from dpf_release.owner.adversaries import straw_man
from dpf_release.owner.project import Project

ROWS = 2000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--project", type=Path, required=True)
    parser.add_argument("--reconstructor", default="rx2s2-c")
    parser.add_argument("--names", nargs="+", default=["equivalence", "paper", "recombine-20"])
    options = parser.parse_args()
    project = Project.open(options.project / "dpf.toml")
    network = straw_man(project, options.reconstructor)
    pictures = project.private_images.pictures.read(project.bank_order[0]["val"][:ROWS]).float() / 255
    banks = {"clean": project.private_bank("val")}
    banks |= {name: FeatureBank(project.vault.candidate(name) / "features", "val") for name in options.names}
    print(f"{options.reconstructor} on {ROWS} val rows:")
    for name, bank in banks.items():
        parts = []
        with torch.inference_mode():
            for start in range(0, ROWS, 250):
                features = torch.from_numpy(bank.read(np.arange(start, start + 250))).float()
                parts.append(network(features.to(project.device)).cpu())
        reconstructions = torch.cat(parts)
        likeness, distance = ssim(reconstructions, pictures), l1(reconstructions, pictures)
        print(f"{name}: SSIM {likeness.mean():.4f}, |SSIM| {likeness.abs().mean():.4f}, L1 {distance.mean():.4f}")


if __name__ == "__main__":
    main()
