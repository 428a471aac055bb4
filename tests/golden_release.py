"""The golden release, and the project that it was made in: fixed images, fixed secrets, fixed seeds.

`python tests/golden_release.py` writes what `tests/golden` holds beside the bank again. Do so only when the format's
version changes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import h5py
import numpy as np
import torch
from safetensors.numpy import load

from dpf_release import Release
from dpf_release.bank.format import read_index
from dpf_release.bank.reader import FeatureBank
from dpf_release.bank.writer import BankWriter, SplitRows
from dpf_release.core.sizes import parse_size
from dpf_release.evaluation.suite import attack
from dpf_release.owner.featurize import featurize
from dpf_release.owner.fit_poison import fit_poison
from dpf_release.owner.init import init
from dpf_release.owner.poison import write_candidate
from dpf_release.owner.project import Project
from dpf_release.owner.train import train
from dpf_release.publish.package import package
from dpf_release.release.signing import new_key
from places import GOLDEN
from tiny_project import CONFIG, write_shapes

KEY = GOLDEN / "owner-key.pub.pem"
BYTES = GOLDEN / "bytes.json"
SMALLER = {  # than the others' project
    "epochs = 6": "epochs = 2",
    "epochs = 12\nbatch_size = 16\nlearning_rate = 0.01": "epochs = 1\nbatch_size = 16",
    'straw_men = ["px2s4"]\nepochs = 14\nbatch_size = 16\nlearning_rate = 0.01': "epochs = 2\nbatch_size = 16",
    "50 kB": "40 kB",
}
# Name -> function and objective: each kind, alone and in a chain.
FUNCTIONS = {
    "default": ("dpf", "equivalence"),
    "paper": ("dpf:depth=2,width=16", "paper"),
    "noise": ("gaussian-noise:scale=0.5", "equivalence"),
    "mixed": ("recombine:k=3", "equivalence"),
    "drawn": ("class-gaussian:k=3", "equivalence"),
    "blurred": ("gaussian-filter+dpf:depth=1", "equivalence"),
    "mixed-deep": ("recombine:k=2+mean-filter+dpf:depth=1", "equivalence"),
}

PUBLISHED = "mixed"  # trained for so little, dpf is refused: its rows are nearly those of φ1(S)


@contextlib.contextmanager
def fixed_secrets() -> Iterator[None]:
    """What the operating system's randomness gives is the same numbers each time."""
    drawn = 0

    def draw(count: int) -> bytes:
        nonlocal drawn
        drawn += 1
        return hashlib.shake_256(drawn.to_bytes(8)).digest(count)

    with (
        mock.patch.object(os, "urandom", draw),
        mock.patch.object(secrets, "token_hex", lambda count: draw(count).hex()),
        mock.patch.object(secrets, "randbits", lambda bits: int.from_bytes(draw(bits // 8))),
    ):
        yield


def golden_project(folder: Path) -> Project:
    """A project with a trained network, features and one candidate for each of `FUNCTIONS`."""
    init(folder)
    config = CONFIG.format(task="", private="images/private")
    for long, short in SMALLER.items():
        assert long in config
        config = config.replace(long, short, 1)
    (folder / "dpf.toml").write_text(config)
    write_shapes(folder / "images" / "private", ("disc", "square"), 30, seed=1)
    write_shapes(folder / "images" / "public", ("cross", "square"), 24, seed=2)
    with fixed_secrets():
        project = Project.open(folder / "dpf.toml")
        train(project)
        featurize(project)
        for name, (function, objective) in FUNCTIONS.items():
            overrides = {"poison.function": function, "poison.objective": objective}
            project = Project.open(folder / "dpf.toml", overrides)
            torch.manual_seed(0)  # of ψ, which is drawn from torch's own generator
            fit_poison(project, name=name)
            write_candidate(project, name)
    return Project.open(folder / "dpf.toml")


def digests(project: Project) -> dict[str, str]:
    """SHA-256 of all that must come out the same: weights, shards of φ1(S), of each candidate, and each learned P.

    φ1(S) is stored as it is before φ1's last ReLU; its shards here are those of its rows as they are read.
    """
    vault = project.vault.root
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        write_as_read(vault / "features", Path(folder) / "features")
        for root, pattern in ((Path(folder), "features/*/*.h5"), (vault, "candidates/*/*/**/*.*")):
            for path in sorted(root.glob(pattern)):
                found[path.relative_to(root).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
    for name in FUNCTIONS:
        if tensors := learned_weights(project, name):
            found[f"functions/{name}"] = _digest_of(tensors)
    return found


def write_as_read(bank: Path, out: Path) -> None:
    """A bank's rows, as a reader gets them, in a bank that stores them so."""
    index = read_index(bank)
    assert index.encoding == "float16 before ReLU"
    header = index.model_copy(update={"splits": {}, "encoding": "float16"})
    writer = BankWriter(out, header, parse_size(SMALLER["50 kB"]), batch_size=4)
    rows = {split: FeatureBank(bank, split) for split in index.splits}
    shards = writer.shards({split: SplitRows(of.targets, of.ids) for split, of in rows.items()})
    features = (rows[span.split].read(np.arange(span.start, span.stop)) for span in writer.batches(shards))
    writer.write(shards, {split: SplitRows(of.targets, of.ids) for split, of in rows.items()}, features)


def learned_weights(project: Project, name: str) -> dict[str, np.ndarray[Any, Any]]:
    """The weights of a fitted P, by the names that its network gives them."""
    path = project.vault.function(name) / "state.safetensors"
    tensors = load(path.read_bytes()) if path.is_file() else {}
    return {key.partition("/")[2]: tensor for key, tensor in tensors.items()}  # without the number of the stage


def _digest_of(tensors: dict[str, np.ndarray[Any, Any]]) -> str:
    whole = hashlib.sha256()
    for key, tensor in sorted(tensors.items()):
        whole.update(f"{key} {tensor.dtype} {tensor.shape}".encode() + tensor.tobytes())
    return whole.hexdigest()


def features_of(release: Release) -> torch.Tensor:
    """All rows of `train`, (N, C, H, W) float32."""
    bank = release.bank("train")
    features, _ = bank[0 : len(bank)]
    return features.float()


def this_machine() -> dict[str, str]:
    """What the bytes depend on: the same on another machine is not to be expected."""
    return {
        "cpu": _processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "h5py": h5py.__version__,
        "hdf5": h5py.version.hdf5_version,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def main() -> None:
    """Writes the golden files."""
    torch.set_num_threads(1)
    os.umask(0o077)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        project = golden_project(root / "shapes")
        tree = {"machine": this_machine(), "sha256": digests(project)}
        BYTES.write_text(json.dumps(tree, indent=2, sort_keys=True) + "\n")
        attack(project, PUBLISHED, profile="quick", only=["A1"], images=200)
        new_key(root / "owner-key")
        shutil.copy(root / "owner-key.pub.pem", KEY)
        for name, key in (("release-1", None), ("release-1-signed", root / "owner-key")):
            package(project, PUBLISHED, out=root / name, sign=key)
            shutil.rmtree(GOLDEN / name, ignore_errors=True)
            shutil.copytree(root / name, GOLDEN / name)
    release = Release.open(GOLDEN / "release-1")
    rows = features_of(release)[:4]
    with torch.inference_mode():
        answers = {
            "answers": release.classifier()(rows).tolist(),
            "mean_of_features": float(release.featurizer()(torch.zeros(1, 3, 32, 32)).mean()),
        }
    (GOLDEN / "answers.json").write_text(json.dumps(answers, indent=2) + "\n")


if __name__ == "__main__":
    main()
