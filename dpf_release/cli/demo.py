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
from dpf_release.release.manifest import MANIFEST, SUMS
from dpf_release.release.verify import verify

# What training the attackers may take: enough to show what they do, not enough for a pass.
ATTACK_IMAGES = 3000
ACCEPTED_RISK = "A demonstration: the pictures are public, and only a short attack was run."
NOT_CLAIMED = """\
Not claimed: that no picture can be reconstructed, that nobody who holds a picture can tell that it
is in the release, or that no attribute can be read from a row. The table shows one attacker,
which P was trained against, on toy images; the attacks of profile quick were cut short."""
SIDE = 32  # the digits are 8 x 8; networks and SSIM's window want more

CONFIG = """\
# Written by `dpf-release demo`. S: the digits 0 to 4. Q: the digits 5 to 9.
[release]
name = "digits-demo"
licence = "cc-by-4.0"
description = "The digits 0 to 4 of scikit-learn's bundled copy of the UCI handwritten digits, poisoned."

[images.private]
path = "images/private"

[images.public]
path = "images/public"

[model]
arch = "resnet20_cifar"
arguments = { width = 16 }
hook = "conv4_1"
size = [32, 32]
resize = 0
mean = [0.3, 0.3, 0.3]
std = [0.4, 0.4, 0.4]

[train]
epochs = 5
batch_size = 32
flip = false
shift = 2

[reconstructor]
epochs = 9
batch_size = 32

[poison]
epochs = 10
batch_size = 32
"""


def demo(out: Path) -> None:
    """Images, configuration, network, features, P, candidate, attacks, release, all in a new folder; says what came.

    Raises:
        ConfigError: the folder is there and is not empty.
    """
    started = time.monotonic()
    project = new_project(out)
    train(project)
    featurize(project)
    fit_poison(project)
    candidate = poison(project)
    report = attack(project, profile="quick", images=ATTACK_IMAGES)
    refusal = _refusal(project)
    manifest = package(project, accept_risk=ACCEPTED_RISK)
    release, figure = out / "release", project.vault.reports("default") / "reconstructions.png"
    if problems := verify(release):
        raise AssertionError(f"the demo's own release does not verify: {problems}")
    print_measurements(candidate.measurements)
    print("\nAttacks:")
    for result in report.attacks:
        print(f"  {result.code} {result.title}: {', '.join([result.verdict, *result.reasons])}")
    print(f"\ndpf-release package: {refusal}")
    print(f'\ndpf-release package --accept-risk "{ACCEPTED_RISK}"\n\nPublic files:')
    for name in sorted([file.path for file in manifest.files] + [SUMS, MANIFEST]):
        print(f"  {name}")
    print(f"\n{NOT_CLAIMED}")
    print(f"\nPictures (private): {figure}\nRelease: {release}\n{time.monotonic() - started:.0f} s")


def new_project(out: Path) -> Project:
    """The digits as images, a configuration and an empty vault; nothing is trained.

    Raises:
        ConfigError: the folder is there and is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(
            f"expected a new or empty folder for the demo, found files in {out}. Name another with --out."
        )
    config = init(out).config
    write_text(config, CONFIG, 0o644)
    _write_digits(out / "images")
    return Project.open(config)


def _refusal(project: Project) -> str:
    """What the gate says of a release that promises what attacks do not bear out."""
    try:
        package(project)
    except RefusedError as error:
        if "those of standard are wanted" in str(error):
            return str(error)
        raise
    raise AssertionError("the demo's attacks are of profile quick, and its gate wants standard")


def _write_digits(folder: Path) -> None:
    pictures, labels = load_digits(return_X_y=True)
    for number, (picture, label) in enumerate(zip(pictures.reshape(-1, 8, 8), labels, strict=True)):
        place = folder / ("private" if label < 5 else "public") / f"{label}"
        place.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray((picture * (255 / 16)).round().astype(np.uint8))
        image.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(place / f"digit-{number:04d}.png")
