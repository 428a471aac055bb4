"""What every test runs under, and a tiny project that has been through all of the owner's steps."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from browsing import browser  # noqa: F401  # a fixture for all
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
from warm_cli import WarmCli

# Two test processes share two cores: more threads would only get in each other's way.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # for the commands that tests start

os.umask(0o077)  # what a test puts into a vault by hand is private: a vault that others can read is refused

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

[model]
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


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that the first test process to ask for it makes and all of them read: nobody may change it."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            half = Path(tempfile.mkdtemp(dir=folder.parent))
            make(half / name)
            (half / name).rename(folder)
    return folder


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project from images to `release/`, with one broken image; read-only, copy it to change it."""
    return made_once(tmp_path_factory, "shapes", finish)


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


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose φ1 never saw S, with rows drawn under a bound in its candidate; not packaged, read-only."""
    return made_once(tmp_path_factory, "drawn", draw)


@pytest.fixture
def drawn_folder(drawn: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change."""
    return Path(shutil.copytree(drawn, tmp_path / "drawn"))


def draw(folder: Path) -> None:
    """A new project with weights from elsewhere, φ2 trained on the rows, up to its candidate."""
    config = new_project(folder)
    text = config.read_text()
    for old, new in DRAWN.items():
        assert old in text
        text = text.replace(old, new, 1)
    config.write_text(text)
    project = Project.open(config)
    (folder / "phi.safetensors").write_bytes(state_file(new_network(project.config.model, 2, True).state_dict()))
    featurize(project)
    fit_poison(project)
    write_candidate(project)


DRAWN = {
    "[model]": '[model]\nweights = "phi.safetensors"\nnever_saw_private = true\nclassifier = "from-bank"',
    "epochs = 6": "classifier_epochs = 1",
    'straw_men = ["px2s4"]': 'function = "mixture:delta=1e-4"\nstraw_men = []',
}


@pytest.fixture(scope="session", autouse=True)
def _cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def project_folder(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished project that a test may change."""
    return Path(shutil.copytree(finished, tmp_path / "shapes"))


def run_cli(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """The real command line, in a process of its own."""
    ((status, _, out, err),) = run_warm(arguments, folder)
    return subprocess.CompletedProcess(arguments, status, out, err)


def killed(folder: Path, event: str, ending: str, number: int, *command: str) -> int:
    """Runs a command that kills itself before step `number` of a kind: an audit event on a path that ends so.

    Returns:
        Its session.
    """
    before = KILLED.format(event=event, ending=ending, number=number)
    ((status, session, _, err),) = run_warm(command, folder, before)
    assert status == -signal.SIGKILL, err
    return session


KILLED = """\
import os, signal, sys
left = {number}
def hook(name, arguments):
    global left
    if name == "{event}" and str(arguments[0]).endswith("{ending}"):
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
"""


def run_warm(
    arguments: tuple[str, ...], folder: Path, before: str = "", ranks: Sequence[Mapping[str, str]] = ({},)
) -> list[tuple[int, int, str, str]]:
    """`WarmCli.run`, where each rank has these variables besides the ones that are here."""
    if not WARM:
        WARM.append(WarmCli())
    envs = [{**os.environ, "COLUMNS": "160", **variables} for variables in ranks]
    with tempfile.TemporaryDirectory() as scratch:
        return WARM[0].run(arguments, folder, envs, Path(scratch), before)


WARM: list[WarmCli] = []


@pytest.fixture(scope="session", autouse=True)
def _warm_cli_ends() -> Iterator[None]:
    yield
    while WARM:
        WARM.pop().close()
