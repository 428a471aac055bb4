"""A tiny project of drawn shapes, and what takes it through the owner's steps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from dpf_release.models.weights import state_file
from dpf_release.owner.cut_network import new_network
from dpf_release.owner.featurize import featurize
from dpf_release.owner.fit_poison import fit_poison
from dpf_release.owner.init import init
from dpf_release.owner.measure import measure
from dpf_release.owner.poison import write_candidate
from dpf_release.owner.project import Project
from dpf_release.owner.train import train
from dpf_release.publish.package import package

CONFIG = """\
[release]
name = "shapes"
licence = "cc0-1.0"
description = "Generated shapes."
{task}
[images.private]
path = "{private}"
max_bad = 0.1

[images.public]
path = "images/public"

[network]
arch = "resnet20_cifar"
arguments = {{ width = 4 }}
hook = "conv4_1"
size = [32, 32]
resize = 0
mean = [0.5, 0.5, 0.5]
std = [0.25, 0.25, 0.25]

[train]
epochs = 6
batch_size = 16
learning_rate = 0.05

[reconstructor]
epochs = 12
batch_size = 16
learning_rate = 0.01

[poison]
straw_men = ["px2s4"]
epochs = 14
batch_size = 16
learning_rate = 0.01

[bank]
shard_size = "50 kB"
batch_size = 4

[claims]
reconstruction = false

[compute]
device = "cpu"
bf16 = "off"
"""


def draw_shape(kind: str, generator: np.random.Generator) -> Image.Image:
    """A bright disc, square or cross somewhere on a coloured ground, 32 px."""
    ground = tuple(int(value) for value in generator.integers(0, 110, 3))
    ink = tuple(int(value) for value in generator.integers(150, 256, 3))
    picture = Image.new("RGB", (32, 32), ground)
    x, y = (int(value) for value in generator.integers(2, 14, 2))
    box, draw = (x, y, x + 14, y + 14), ImageDraw.Draw(picture)
    if kind == "disc":
        draw.ellipse(box, fill=ink)
    elif kind == "square":
        draw.rectangle(box, fill=ink)
    else:
        draw.line((x, y, x + 14, y + 14), fill=ink, width=3)
        draw.line((x, y + 14, x + 14, y), fill=ink, width=3)
    return picture


def write_shapes(folder: Path, kinds: tuple[str, ...], count: int, seed: int) -> None:
    """`count` pictures of each kind as folder/KIND/NAME.png."""
    generator = np.random.default_rng(seed)
    for kind in kinds:
        (folder / kind).mkdir(parents=True)
        for number in range(count):
            draw_shape(kind, generator).save(folder / kind / f"{kind}-portrait-{number:03d}.png")


def new_project(folder: Path, task: str = "", private: str = "images/private") -> Path:
    """A vault, images and a configuration; nothing trained. Returns the configuration's path."""
    init(folder)
    (folder / "dpf.toml").write_text(CONFIG.format(task=task, private=private))
    write_shapes(folder / "images" / "private", ("disc", "square"), 60, seed=1)
    write_shapes(folder / "images" / "public", ("cross", "square"), 130, seed=2)
    return folder / "dpf.toml"


def finish(folder: Path) -> None:
    """A new project, with one broken image, through all of the owner's steps."""
    config = new_project(folder)
    (folder / "images" / "private" / "disc" / "disc-portrait-007.png").write_bytes(b"not a picture")
    project = Project.open(config)
    train(project)
    featurize(project)
    torch.manual_seed(1)  # of ψ, which is drawn from torch's own generator
    fit_poison(project)
    write_candidate(project)
    measure(project)
    package(project)


def draw(folder: Path) -> None:
    """A new project with weights from elsewhere, φ2 trained on the rows, up to its candidate."""
    config = new_project(folder)
    text = config.read_text()
    for old, new in DRAWN.items():
        assert old in text
        text = text.replace(old, new, 1)
    config.write_text(text)
    project = Project.open(config)
    (folder / "phi.safetensors").write_bytes(state_file(new_network(project.config.network, 2, True).state_dict()))
    featurize(project)
    fit_poison(project)
    write_candidate(project)


DRAWN = {
    "[network]": '[network]\nweights = "phi.safetensors"\nnever_saw_private = true\nclassifier = "from-bank"',
    "epochs = 6": "classifier_epochs = 1",
    'straw_men = ["px2s4"]': 'function = "mixture:delta=1e-4"\nstraw_men = []',
}
