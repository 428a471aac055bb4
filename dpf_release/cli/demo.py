"""`demo`: the whole path on images that scikit-learn ships. S: the digits 0 to 4; Q: 5 to 9."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from dpf_release.cli.printing import print_measurements
from dpf_release.core.files import write_text
from dpf_release.errors import ConfigError, RefusedError
from dpf_release.evaluation.suite import attack
from dpf_release.owner.featurize import featurize
from dpf_release.owner.fit_poison import fit_poison
from dpf_release.owner.init import init
from dpf_release.owner.poison import poison
from dpf_release.owner.project import Project
from dpf_release.owner.train import train
from dpf_release.publish.package import package
from dpf_release.release.manifest import MANIFEST, SUMS, Manifest
from dpf_release.release.verify import verify

# What training the attackers may take: enough to show what they do, not enough for a pass.
ATTACK_IMAGES = 3000
NOT_CLAIMED = """\
Not claimed: too few images. That no image can be reconstructed, and that nobody can tell which images
are in it, is tested on 1,000 images and more; here the attacks were cut short. What is claimed, the
privacy bound, does not rest on them."""
NOT_CLAIMED_PAPER = """\
The paper's function, trained on the private images, was refused: attacks have to support what a release
promises, and they do not. It would take --accept-risk "REASON" to publish it all the same."""
SIDE = 32  # the digits are 8 x 8; networks and SSIM's window want more

CONFIG = """\
# Written by `dpf-release demo`. Private images S: the digits 0 to 4. Public images Q: the digits 5 to 9.
[release]
name = "digits-demo"
licence = "cc-by-4.0"
description = "The digits 0 to 4 of scikit-learn's bundled copy of the UCI handwritten digits, as drawn features."

[images.private]
path = "images/private"

[images.public]
path = "images/public"

[network]
arch = "resnet20_cifar"
arguments = {{ width = 16 }}
hook = "conv4_1"
size = [32, 32]
resize = 0
mean = [0.3, 0.3, 0.3]
std = [0.4, 0.4, 0.4]
{network}
[train]
epochs = 5
batch_size = 32
flip = false
shift = 2
{rest}"""
# φ1 is trained on Q alone and φ2 on drawn rows, so the bound of the function holds for the release.
OURS = {
    "network": 'train_on = "public"\nclassifier = "from-bank"\n',
    "rest": """
[poison]
function = "mixture"
straw_men = []

[claims]
reconstruction = false
bound = true
""",
}
# As in the paper: Φ is trained on S, and P on S against a reconstructor that is trained on Q.
PAPER = {
    "network": "",
    "rest": """
[reconstructor]
epochs = 9
batch_size = 32

[poison]
function = "dpf"
epochs = 10
batch_size = 32
""",
}


def demo(out: Path, *, paper: bool = False) -> None:
    """Images, configuration, network, features, P, candidate, attacks, release, all in a new folder; says what came.

    Args:
        out: a new or empty folder.
        paper: with the paper's function, which is attacked and refused, in the place of drawn rows.

    Raises:
        ConfigError: the folder is there and is not empty.
    """
    started = time.monotonic()
    project = new_project(out, paper=paper)
    train(project)
    featurize(project)
    fit_poison(project)
    candidate = poison(project)
    report = attack(project, profile="quick", images=ATTACK_IMAGES)
    manifest, refusal = (None, _refusal(project)) if paper else (_published(project), "")
    print_measurements(candidate.measurements)
    print("\nAttacks:")
    for result in report.attacks:
        print(f"  {result.code} {result.title}: {', '.join([result.verdict, *result.reasons])}")
    for code, reason in report.not_applicable.items():
        print(f"  {code}: not applicable, {reason}")
    if manifest is None:
        print(f"\ndpf-release package: {refusal}\n\n{NOT_CLAIMED_PAPER}")
    else:
        print("\ndpf-release package\n\nPublic files:")
        for name in sorted([file.path for file in manifest.files] + [SUMS, MANIFEST]):
            print(f"  {name}")
        print(f"\nClaimed: {', '.join(manifest.claims.made)}.\n{NOT_CLAIMED}\nRelease: {out / 'release'}")
    if candidate.pictures:
        print(f"\nImages (private): {candidate.pictures}")
    print(f"{time.monotonic() - started:.0f} s")


def _published(project: Project) -> Manifest:
    """The release, which verifies."""
    manifest = package(project)
    if problems := verify(project.config.folder / "release"):
        raise AssertionError(f"the demo's own release does not verify: {problems}")
    return manifest


def _refusal(project: Project) -> str:
    """What the gate says of a release that promises what attacks do not support."""
    try:
        package(project)
    except RefusedError as error:
        if "reconstruction: A1" in str(error):
            return str(error)
        raise
    raise AssertionError(
        "the paper's function was published: its attacks are of profile quick, the gate wants standard"
    )


def new_project(out: Path, *, paper: bool = False) -> Project:
    """The digits as images, a configuration and an empty vault; nothing is trained.

    Raises:
        ConfigError: the folder is there and is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(
            f"expected a new or empty folder for the demo, found files in {out}. Name another with --out."
        )
    config = init(out).config
    write_text(config, CONFIG.format(**(PAPER if paper else OURS)), 0o644)
    _write_digits(out / "images")
    return Project.open(config)


def _write_digits(folder: Path) -> None:
    pictures, labels = load_digits(return_X_y=True)
    for number, (picture, label) in enumerate(zip(pictures.reshape(-1, 8, 8), labels, strict=True)):
        place = folder / ("private" if label < 5 else "public") / f"{label}"
        place.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray((picture * (255 / 16)).round().astype(np.uint8))
        image.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(place / f"digit-{number:04d}.png")
