"""`init`: a folder with a commented `dpf.toml` and a vault."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from dpf_release.core.files import make_folder, replacing, write_json, write_text
from dpf_release.errors import ConfigError
from dpf_release.models.weights import load_state, state_file
from dpf_release.owner.config import CONFIG_NAME, read_config
from dpf_release.owner.vault.vault import Vault
from dpf_release.release.model_record import CUSTOM, ModelRecord, PreprocessRecord
from dpf_release.release.release import Release

# As the template has them for an owner with a network of their own.
_TASK = """\
kind = "classification"          # or "regression", with the columns of the CSV table:
# targets = ["yaw_deg"]
# unit = "degrees\""""
_CLASSES = '# classes = ["cat", "dog"]       # only these, in this order'
_WEIGHTS = '# weights = "phi.safetensors"   # .safetensors or a torch state_dict; without it, run `dpf-release train`'
_PREPROCESS = PreprocessRecord(size=(224, 224), resize=256, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


@dataclass(frozen=True)
class InitResult:
    """What `init` made.

    Attributes:
        config: the `dpf.toml`, to be edited.
        vault: the folder of what is private.
    """

    config: Path
    vault: Path


def init(folder: Path | str, *, from_release: Path | str | None = None) -> InitResult:
    """Makes `dpf.toml` and the vault in a folder.

    Args:
        folder: made where missing; must have no `dpf.toml`.
        from_release: a release whose φ1 and φ2 this owner shares, so that both banks can be trained on together; the
            vault gets its network, so that no `train` is needed.

    Raises:
        ConfigError: there is a `dpf.toml` already, or the release's network is its owner's own code.
        VerificationError: the release is not what its manifest says.

    Example:
        >>> from dpf_release import init
        >>> init("second-release", from_release="my-release/release").config.as_posix()
        'second-release/dpf.toml'
    """
    folder = Path(folder)
    config = folder / CONFIG_NAME
    if config.exists():
        raise ConfigError(f"{config} is there already. Edit it, or name another folder.")
    release = Release.open(Path(from_release)) if from_release else None
    if release and release.record.arch == CUSTOM:
        raise ConfigError(
            "the release's network is its owner's own code; ask them for it and name it under [model] arch."
        )
    make_folder(folder, 0o755)
    vault = Vault.create(folder / "vault")
    write_text(config, _template(folder, release.record if release else None), 0o644)
    read_config(config)  # the template is tested where it is used
    if release:
        _take_network(vault, release)
    return InitResult(config, vault.root)


def _take_network(vault: Vault, release: Release) -> None:
    make_folder(vault.network)
    parts = [load_state(release.folder / "model" / f"{part}.safetensors") for part in ("featurizer", "classifier")]
    with replacing(vault.network / "phi.safetensors") as partial:
        partial.write_bytes(state_file(parts[0] | parts[1]))
    write_json(vault.network / "network.json", release.record.model_dump(mode="json"))


def _template(folder: Path, record: ModelRecord | None) -> str:
    """The commented `dpf.toml`, with the network, the task and the classes of a release where there is one."""
    name = "".join(letter if letter.isalnum() else "-" for letter in folder.resolve().name).strip("-") or "my-release"
    preprocess = record.preprocess if record else _PREPROCESS
    pairs = ", ".join(f"{key} = {value}" for key, value in (record.arguments if record else {}).items())
    task, classes = _TASK, _CLASSES
    if record and record.task == "regression":
        task = f'kind = "regression"\ntargets = {_toml_list(record.targets)}\nunit = {_toml_text(record.unit)}'
    elif record:
        classes = f"classes = {_toml_list(record.classes)}  # only these, in this order"
    return (
        files("dpf_release.owner")
        .joinpath(CONFIG_NAME)
        .read_text(encoding="utf-8")
        .format(
            name=name[:64],
            task=task,
            classes=classes,
            arch=record.arch if record else "resnet18",
            hook=record.hook if record else "conv4_1",
            weights="# weights: those of the release are in the vault" if record else _WEIGHTS,
            size=list(preprocess.size),
            resize=preprocess.resize or 0,
            mean=list(preprocess.mean),
            std=list(preprocess.std),
            arguments=f"arguments = {{ {pairs} }}\n" if pairs else "",
        )
    )


def _toml_list(names: tuple[str, ...]) -> str:
    return "[" + ", ".join(map(_toml_text, names)) + "]"


def _toml_text(text: str) -> str:
    # A JSON string is a TOML basic string; both escape in the same way.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
