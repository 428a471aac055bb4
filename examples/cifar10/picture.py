"""docs/reconstructions.png: public pictures of Q, what ψ makes of φ1 of them, and of P of that.

    python examples/cifar10/picture.py --project /tmp/cifar10 --out docs/reconstructions.png

An owner never does this: a public picture beside its poisoned features is a known pair for an attacker. Here S is
public too, and the release is thrown away.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from dpf_release.images.grid import draw_grid
from dpf_release.owner.adversaries import straw_man
from dpf_release.owner.fitted import load_function
from dpf_release.owner.project import Project

PICTURES = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--project", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    project = Project.open(options.project / "dpf.toml")
    images = project.public_images
    rows = images.rows("val")
    rows = rows[np.linspace(0, len(rows) - 1, PICTURES).astype(int)]  # the table is sorted by class: some of each
    pictures = images.pictures.read(rows).to(project.device)
    reconstructor = straw_man(project, "px2s2")
    (network,) = load_function(project, "equivalence").chain.networks()
    with torch.inference_mode():
        features = project.frozen(project.cut.split.featurizer)(project.preprocess.normalise(pictures))
        before, after = reconstructor(features), reconstructor(network(features))
    options.out.write_bytes(draw_grid({"original": pictures.float() / 255, "before": before, "after": after}))
    options.out.chmod(0o644)


if __name__ == "__main__":
    main()
