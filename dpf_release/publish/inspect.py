"""`inspect`: what a path holds, or where a network can be cut."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import h5py
from torch import nn

from dpf_release.bank.format import INDEX, BankIndex, open_shard, read_index
from dpf_release.errors import ConfigError
from dpf_release.models.hooks import hook_points
from dpf_release.models.zoo import build_network, is_public_architecture
from dpf_release.owner.config import CONFIG_NAME, read_config
from dpf_release.owner.cut_network import import_from
from dpf_release.owner.vault.contents import at_rest
from dpf_release.owner.vault.vault import Vault
from dpf_release.release.manifest import MANIFEST
from dpf_release.release.model_record import ModelRecord, read_model_record
from dpf_release.release.release import Release


class Table(NamedTuple):
    """Something to print: what it is, names of the columns, their cells."""

    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def inspect(path: str, size: int = 224, width: int | None = None, *, trust_code: bool = False) -> list[Table]:
    """What a release, vault, bank, shard, `dpf.toml` or architecture is.

    Args:
        path: the name of an architecture (which goes before a path of that name), or a path.
        size: side of an architecture's input, in pixels.
        width: argument of the CIFAR-sized ResNets.
        trust_code: import and run a network of its owner's own that a `dpf.toml` names, from its folder too.

    Raises:
        ConfigError: it is none of these.
    """
    place = Path(path)
    if is_public_architecture(path):
        return [_hooks(path, build_network(path, 10, {} if width is None else {"width": width}), (size, size))]
    if place.suffix == ".h5" and place.is_file():
        return [_shard(place)]
    if place.suffix == ".toml":
        config = read_config(place)
        if trust_code:
            import_from(config.folder)
        model = config.network
        return [_hooks(model.arch, build_network(model.arch, 10, model.arguments, allow_import=trust_code), model.size)]
    if (place / MANIFEST).is_file():
        release = Release.open(place)
        files = [(file.path, file.role, str(file.bytes)) for file in release.manifest.files]
        return [
            _model(release.record),
            _bank("features", release.index),
            Table(f"{release.manifest.name} {release.manifest.version}", ("file", "role", "bytes"), files),
        ]
    if (place / INDEX).is_file():
        return [_bank(path, read_index(place))]
    if (place / "network").is_dir() or (place.name == "vault" and place.is_dir()):
        return _vault(place)
    raise ConfigError(
        f"expected a release, vault, bank, shard, {CONFIG_NAME} or the name of an architecture, found {path!r}."
    )


def _hooks(name: str, network: nn.Module, size: tuple[int, int]) -> Table:
    points = hook_points(network, size)
    rows = [(p.name, p.path, " x ".join(map(str, p.shape)), str(p.bytes_per_row)) for p in points]
    title = f"Hook points of {name}, {size[0]} x {size[1]} px"
    return Table(title, ("hook", "module", "shape", "bytes a row"), rows)


def _bank(title: str, index: BankIndex) -> Table:
    rows = [
        (split, str(rows), str(len(index.splits[split])), str(sum(shard.bytes for shard in index.splits[split])))
        for split, rows in index.rows.items()
    ]
    encoding, _, before = index.encoding.partition(" ")
    state = ("poisoned" if index.poisoned else "NOT poisoned: private") + f", {before}" * bool(before)
    shape = " x ".join(map(str, index.feature_shape))
    return Table(f"Bank {title}: {shape} {encoding}, {state}", ("split", "rows", "shards", "bytes"), rows)


def _shard(path: Path) -> Table:
    with open_shard(path) as shard:
        rows = [(f"@{key}", str(value)) for key, value in shard.attrs.items()]
        for member in shard:
            # Only what the file itself says of its own data sets: links are named, never followed.
            link = shard.get(member, getlink=True)
            found = shard[member] if isinstance(link, h5py.HardLink) else None
            shown = f"{found.dtype} {found.shape}" if isinstance(found, h5py.Dataset) else type(link).__name__
            rows.append((f"/{member}", shown))
    return Table(f"Shard {path.name}", ("member", "value"), rows)


def _model(record: ModelRecord) -> Table:
    names = record.classes or record.targets
    facts = {
        "architecture": f"{record.arch} {record.arguments or ''}",
        "hook": record.hook,
        "features": " x ".join(map(str, record.feature_shape)),
        "task": record.task,
        "outputs": ", ".join(names[:10]) + (", ..." if len(names) > 10 else ""),
        "images": f"{record.preprocess.size} px, shorter side {record.preprocess.resize or 'as it is'}",
    }
    return Table("Network", ("", ""), list(facts.items()))


def _vault(folder: Path) -> list[Table]:
    tables = []
    if (folder / "network" / "network.json").is_file():
        tables.append(_model(read_model_record(folder / "network" / "network.json")))
    if (folder / "features" / INDEX).is_file():
        tables.append(_bank("features", read_index(folder / "features")))
    for candidate in sorted(folder.glob(f"candidates/*/features/{INDEX}")):
        tables.append(_bank(f"candidate {candidate.parent.parent.name}", read_index(candidate.parent)))
    vault = Vault(folder)
    holdings = [
        (str(member.relative_to(folder)), str(file.stat().st_size), at_rest(file.name))
        for member in vault.members()
        if member.suffix != ".h5" and "candidates" not in member.relative_to(folder).parts
        for file in [vault.file_of(member)]
    ]
    return [*tables, Table("Private files", ("file", "bytes", ""), holdings)]
