"""How fast `featurize` and `poison` write banks, beside their parts alone; their memory; and what a second rank brings.

From the root of the project, on a machine with little else to do; IMAGES is a flat folder of JPEGs:

    pip install -e .
    python benchmarks/featurize.py featurize --images IMAGES --folder FOLDER --json featurize.json
    python benchmarks/featurize.py memory --images IMAGES --folder FOLDER --rows 2000 10000 --json memory.json
    python benchmarks/featurize.py poison --folder FOLDER --json poison.json
    python benchmarks/featurize.py ranks --folder FOLDER --json ranks.json

All on the CPU, with all its cores, and with random weights: they take as long as trained ones. The pictures are
repeated by links until there are `--rows`. A project is made anew in FOLDER each time and removed at the end.

`featurize`: the limit of two things that share the cores, each measured alone with all of them, is
1 / (1 / decode + 1 / forward). Decode: `Pictures.stream` with as many workers, from its first batch on. Forward: the
frozen φ1 in channels_last on one normalised batch in memory, after one batch that warms up. Featurize: all of
`featurize(project)` for a plan that is drawn and no shard, nothing subtracted; images, survey and network are read
before. What is timed takes turns, `--repeats` times.
`poison`: the forward of P on one batch, float32 and channels_last, beside the whole bank written from one on disk.
`memory`: peaks of resident memory, VmHWM. That of the workers is the largest sum, at any moment, of the peaks of all
processes that the main one has then; memory that they share counts in each.
`ranks`: whole commands, each process with one thread of torch's. A run that finds all shards there tells what is no
row's work; a training of fewer epochs what is no step's. An epoch's validation, by rank 0, counts as steps' time.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from dpf_release.bank.build import write_bank
from dpf_release.bank.format import BankIndex, SplitName
from dpf_release.bank.reader import FeatureBank
from dpf_release.bank.writer import BankWriter, Span, SplitRows
from dpf_release.core.files import sha256_of
from dpf_release.core.ranks import Ranks
from dpf_release.models.weights import freeze, state_file
from dpf_release.models.zoo import build_network
from dpf_release.owner.featurize import featurize
from dpf_release.owner.init import init
from dpf_release.owner.project import Project
from dpf_release.poisoning.chain import build_chain
from dpf_release.poisoning.plan import FeatureSpec

Times = defaultdict[str, list[float]]
SPLIT_OF = ["train"] * 8 + ["val", "test"]  # of ten images in a row
LARGE = "size = [224, 224], resize = 256"
CONFIG = """\
network = {{ arch = "{arch}", weights = "phi.safetensors", hook = "{hook}", {network} }}
reconstructor = {{ epochs = 1, batch_size = 64 }}
poison = {{ batch_size = {batch_size} }}
bank = {{ shard_size = "{shard_size}", batch_size = {batch_size} }}
compute = {{ device = "cpu", bf16 = "off", workers = {workers} }}
"""


def spread(values: Sequence[float], form: str = ",.1f") -> str:
    return f"{statistics.median(values):{form}} | {min(values):{form}} to {max(values):{form}}"


def without_shards(folder: Path) -> None:
    for path in [folder / "index.json", *folder.glob("*/*.h5")]:
        path.unlink(missing_ok=True)


def link_images(folder: Path, images: Sequence[Path], rows: int) -> None:
    """Two classes in three splits, of the same few images again and again."""
    for number, image in zip(range(rows), itertools.cycle(images), strict=False):
        link = folder / SPLIT_OF[number % 10] / f"class-{number // 10 % 2}" / f"{number:06}{image.suffix}"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(image.resolve())


@contextlib.contextmanager
def project_of(folder: Path, arch: str, arguments: dict[str, int], **config: Any) -> Iterator[Path]:
    """A project without images, its network random; it is removed at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="project-", dir=folder.resolve()) as name:
        root = Path(name)
        init(root)
        (root / "dpf.toml").write_text(CONFIG.format(arch=arch, **config))
        torch.manual_seed(0)
        (root / "phi.safetensors").write_bytes(state_file(build_network(arch, 2, arguments).state_dict()))
        yield root


def jpegs(folder: Path) -> list[Path]:
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in {".jpg", ".jpeg"})
    if not found:
        raise SystemExit(f"--images: expected JPEGs in {folder}, found none.")
    return found


def forward_rate(network: nn.Module, batch: Tensor, rows: int) -> float:
    """Rows/s of a frozen network on one batch again and again."""
    passes = max(1, rows // len(batch))
    with torch.inference_mode():
        network(batch)
        began = time.perf_counter()
        for _ in range(passes):
            network(batch)
    return passes * len(batch) / (time.perf_counter() - began)


# --------------------------------------------------------------------------------------------- featurize and poison


def measure_featurize(args: argparse.Namespace) -> dict[str, Any]:
    if args.rows < 2 * args.batch_size:
        raise SystemExit(f"--rows: expected two batches at least, {2 * args.batch_size}")
    config = {"hook": args.hook, "network": LARGE, "batch_size": args.batch_size, "workers": args.workers}
    with project_of(args.folder, args.arch, {}, shard_size="1 GiB", **config) as root:
        link_images(root / "images/private", jpegs(args.images), args.rows)
        project, began = Project.open(root / "dpf.toml"), time.perf_counter()
        images = project.private_images
        survey = time.perf_counter() - began
        featurize(project)  # draws the plan
        phi_1, rates = project.frozen(project.cut.split.featurizer), Times(list)
        rows = np.arange(len(images.table))
        batches = [rows[start : start + args.batch_size] for start in range(0, len(rows), args.batch_size)]
        batch = project.preprocess.normalise(images.pictures.read(batches[0]))
        batch, starts = batch.contiguous(memory_format=torch.channels_last), []
        for repeat in range(args.repeats):
            began = time.perf_counter()
            stream = images.pictures.stream(batches)
            next(stream)
            first = time.perf_counter()
            starts.append(first - began)
            decoded = sum(len(pictures) for pictures, _ in stream)
            rates["decode alone"].append(decoded / (time.perf_counter() - first))
            rates["forward alone"].append(forward_rate(phi_1, batch, args.rows))
            without_shards(project.vault.features)
            again = Project.open(root / "dpf.toml")
            _ = again.private_images, again.cut
            began = time.perf_counter()
            index = featurize(again).index
            rates["featurize"].append(args.rows / (time.perf_counter() - began))
            again.private_images.pictures.close()
            print(f"{repeat + 1} of {args.repeats} rounds done", file=sys.stderr)
    parts = zip(rates["decode alone"], rates["forward alone"], strict=True)
    rates["limit of both"] = [1 / (1 / decode + 1 / forward) for decode, forward in parts]
    print(f"{args.arch} to {args.hook}, {args.rows} images, batches of {args.batch_size}, {args.workers} workers")
    ratio = print_rates(rates, "featurize", "limit of both", "images/s")
    print(f"\nThe survey before, once: {survey:.1f} s, {args.rows / survey:,.1f} images/s")
    print(f"The first decoded batch, which the limit leaves out: {statistics.median(starts):.1f} s (workers start)")
    report = {"survey_seconds": survey, "first_batch_seconds": starts, "row_bytes": index.row_bytes}
    return {**report, "images_per_second": rates, "ratio": ratio}


def measure_poison(args: argparse.Namespace) -> dict[str, Any]:
    shape, rates = (1024, 14, 14), Times(list)
    header = BankIndex(poisoned=False, featurizer_sha256="0" * 64, feature_shape=shape, targets=0)
    generator = torch.Generator().manual_seed(0)
    ids = np.zeros((args.rows, 16), np.uint8)
    rows: dict[SplitName, SplitRows] = {"train": SplitRows(np.zeros(args.rows, np.int64), ids)}
    args.folder.mkdir(parents=True, exist_ok=True)

    def random(spans: Sequence[Span]) -> Iterator[NDArray[np.floating[Any]]]:
        for span in spans:
            yield torch.randn((len(span), *shape), generator=generator).relu_().numpy()

    with tempfile.TemporaryDirectory(prefix="poison-", dir=args.folder.resolve()) as name:
        source, target = Path(name) / "bank", Path(name) / "poisoned"
        write_bank(BankWriter(source, header), rows, random, Ranks(), "Random features", "rows")
        torch.manual_seed(0)
        chain = build_chain("dpf", FeatureSpec(shape, True))
        (network,) = chain.networks()
        network = freeze(network).to(memory_format=torch.channels_last)
        bank = FeatureBank(source, "train")
        poisoned = chain.on(bank, chain.plan(bank, nn.Identity(), bytes(32)))

        def compute(spans: Sequence[Span]) -> Iterator[NDArray[np.floating[Any]]]:
            for span in spans:
                yield poisoned.read(np.arange(span.start, span.stop))

        batch = torch.from_numpy(bank.read(np.arange(min(args.batch_size, args.rows)))).float()
        batch = batch.contiguous(memory_format=torch.channels_last)
        writer = BankWriter(target, header, batch_size=args.batch_size)
        for repeat in range(args.repeats):
            rates["forward alone"].append(forward_rate(network, batch, args.rows))
            without_shards(target)
            began = time.perf_counter()
            write_bank(writer, rows, compute, Ranks(), "Poisoning", "rows")
            rates["poison"].append(args.rows / (time.perf_counter() - began))
            print(f"{repeat + 1} of {args.repeats} rounds done", file=sys.stderr)
    print(f"dpf of the default size on {args.rows} rows of {shape}, batches of {args.batch_size}")
    return {"rows_per_second": rates, "ratio": print_rates(rates, "poison", "forward alone", "rows/s")}


def print_rates(rates: Times, ours: str, limit: str, unit: str) -> float:
    print(f"\n| | {unit} | lowest to highest | by the limit |\n|---|--:|--:|--:|")
    middle = {name: statistics.median(values) for name, values in rates.items()}
    for name, values in rates.items():
        print(f"| {name} | {spread(values)} | {middle[name] / middle[limit]:.2f} |")
    return middle[ours] / middle[limit]


# --------------------------------------------------------------------------------------------- memory


def peaks(root: int) -> dict[int, int]:
    """Peak resident bytes, so far, of a process and of all its descendants that live."""
    parent, found = {}, {}
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError, ValueError, KeyError):  # it may end while we look
            fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
            pid = int(status.parent.name)
            parent[pid], found[pid] = int(fields["PPid"]), int(fields["VmHWM"].split()[0]) * 1024
    family = {root}
    while more := {pid for pid, above in parent.items() if above in family} - family:
        family |= more
    return {pid: found[pid] for pid in family if pid in found}


def measure_memory(args: argparse.Namespace) -> dict[str, Any]:
    config = {"hook": args.hook, "network": LARGE, "batch_size": args.batch_size, "workers": args.workers}
    sides: list[dict[str, int]] = []
    for rows in args.rows:
        with project_of(args.folder, args.arch, {}, shard_size="1 GiB", **config) as root:
            link_images(root / "images/private", jpegs(args.images), rows)
            process = subprocess.Popen([sys.executable, "-m", "dpf_release", "featurize"], cwd=root)
            main, workers = 0, 0
            while process.poll() is None:
                seen = peaks(process.pid)
                main = max(main, seen.pop(process.pid, 0))
                workers = max(workers, sum(seen.values()))
                time.sleep(0.1)
            if process.returncode:
                raise SystemExit(f"featurize of {rows} rows failed")
            sides.append({"rows": rows, "main": main, "workers": workers})
    print(f"{args.arch} to {args.hook}, batches of {args.batch_size}, {args.workers} workers: a network that is quick,")
    print("as only the memory is looked at. The first command of a project: with its survey, and its plan drawn.")
    print("\n| rows | main process, MB | by the first | its workers, MB | by the first |\n|--:|--:|--:|--:|--:|")
    for side in sides:
        by = {key: side[key] / max(1, sides[0][key]) for key in ("main", "workers")}
        print(
            f"| {side['rows']:,} | {side['main'] / 1e6:,.0f} | {by['main']:.2f} "
            f"| {side['workers'] / 1e6:,.0f} | {by['workers']:.2f} |"
        )
    return {"peak_bytes": sides}


# --------------------------------------------------------------------------------------------- ranks


def timed(root: Path, ranks: int, *command: str) -> float:
    """Seconds that a command takes, by one process or under torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    began = time.perf_counter()
    result = subprocess.run(
        [sys.executable, *torchrun, "-m", "dpf_release", *command],
        cwd=root,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if result.returncode:
        raise SystemExit(f"{' '.join(command)}, {ranks} ranks:\n{result.stderr}")
    return time.perf_counter() - began


def measure_ranks(args: argparse.Namespace) -> dict[str, Any]:
    network = "arguments = { width = 16 }, size = [32, 32], resize = 0"
    config = {"hook": "conv4_1", "network": network, "batch_size": args.batch_size, "workers": args.workers}
    seconds, bytes_of = Times(list), set()
    with project_of(args.folder, "resnet20_cifar", {"width": 16}, shard_size="1 MiB", **config) as root:
        drawn, generator = root / "drawn", np.random.default_rng(0)
        for folder, count in ((drawn, 512), (root / "images/public", 256)):
            folder.mkdir(parents=True)
            for number in range(count):
                picture = generator.integers(0, 256, (32, 32, 3), np.uint8)
                Image.fromarray(picture).save(folder / f"{number}.png")
        link_images(root / "images/private", sorted(drawn.iterdir()), args.rows)
        features = root / "vault/features"
        timed(root, 1, "featurize")  # draws the plan
        timed(root, 1, "fit-poison", "--name", "x", "--epochs", "1")  # trains the straw man
        for repeat in range(args.repeats):
            for ranks in (1, 2):
                without_shards(features)
                whole = timed(root, ranks, "featurize")
                files = [features / "index.json", *sorted(features.glob("*/*.h5"))]
                bytes_of.add(tuple((path.relative_to(features).as_posix(), sha256_of(path)) for path in files))
                rest = timed(root, ranks, "featurize")
                few, many = (
                    timed(root, ranks, "fit-poison", "--name", "x", "--restart", "--epochs", str(epochs))
                    for epochs in (1, 1 + args.epochs)
                )
                train_rows = sum(SPLIT_OF[number % 10] == "train" for number in range(args.rows))
                steps = args.epochs * max(1, train_rows // args.batch_size)
                measured = {"featurize, whole command (s)": whole, "featurize, its rows (s)": whole - rest}
                measured |= {"fit-poison, one step (ms)": (many - few) / steps * 1e3}
                for name, value in measured.items():
                    seconds[f"{name}, {ranks} ranks"].append(value)
            print(f"{repeat + 1} of {args.repeats} rounds done", file=sys.stderr)
    print(f"resnet20_cifar, {args.rows} rows, batches of {args.batch_size} by all ranks, {args.workers} workers a rank")
    print("\n| | 1 process | lowest to highest | 2 ranks | lowest to highest | speed-up |\n|---|--:|--:|--:|--:|--:|")
    for name in measured:
        one, two = (seconds[f"{name}, {ranks} ranks"] for ranks in (1, 2))
        speedup = statistics.median(one) / statistics.median(two)
        print(f"| {name} | {spread(one, '.2f')} | {spread(two, '.2f')} | {speedup:.2f} |")
    print(f"\nShards and index, by 1 process and by 2: {'identical' if len(bytes_of) == 1 else 'DIFFERENT'}")
    return {"measured": seconds, "identical": len(bytes_of) == 1, "files": max(map(len, bytes_of))}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    workers = os.cpu_count() or 1
    for name, measure, arch, default in (
        ("featurize", measure_featurize, "resnet50", 2000),
        ("memory", measure_memory, "resnet18", [2000, 10_000]),
        ("poison", measure_poison, None, 1000),
        ("ranks", measure_ranks, None, 4000),
    ):
        command = commands.add_parser(name)
        command.set_defaults(measure=measure)
        command.add_argument("--folder", type=Path, required=True, help="where to work; what is made there is removed")
        command.add_argument("--rows", type=int, default=default, nargs="+" if name == "memory" else None)
        command.add_argument("--batch-size", type=int, default=128)
        command.add_argument("--json", type=Path, help="write what was measured here too")
        if arch:
            command.add_argument("--images", type=Path, required=True, help="a flat folder of JPEGs")
            command.add_argument("--arch", default=arch)
            command.add_argument("--hook", default="conv4_1")
        if name != "poison":
            command.add_argument("--workers", type=int, default=2 if arch else 0, help="decoding processes; 0: threads")
        if name != "memory":
            command.add_argument("--repeats", type=int, default=3)
        if name == "ranks":
            command.add_argument("--epochs", type=int, default=4, help="of the training that are timed")
    args = parser.parse_args()
    measured = args.measure(args)
    options = {key: value for key, value in vars(args).items() if isinstance(value, (int, str, list))}
    report = {**options, "cpus": workers, "torch": torch.__version__, **measured}
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0 if measured.get("identical", True) else 1


if __name__ == "__main__":
    sys.exit(main())
