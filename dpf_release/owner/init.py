"""`init`: a folder with a commented `dpf.toml` and a vault."""

from __future__ import annotations

import json
from pathlib import Path

from dpf_release.core.files import make_folder, replacing, write_json, write_text
from dpf_release.errors import ConfigError
from dpf_release.models.weights import load_state, save_state
from dpf_release.owner.config import CONFIG_NAME, TEMPLATE, read_config
from dpf_release.owner.vault.vault import Vault
from dpf_release.release.model_record import CUSTOM, PreprocessRecord
from dpf_release.release.release import Release


def init(folder: Path, from_release: Path | None = None) -> Vault:
    """Makes `dpf.toml` and the vault in a folder.

    Args:
        folder: made where missing; must have no `dpf.toml`.
        from_release: a release whose φ1 and φ2 this owner shares, so that both banks can be trained on together; the
            vault gets its network, so that no `train` is needed.

    Raises:
        ConfigError: there is a `dpf.toml` already, or the release's network is its owner's own code.
        VerificationError: the release is not what its manifest says.
    """
    config = folder / CONFIG_NAME
    if config.exists():
        raise ConfigError(f"{config} is there already. Edit it, or name another folder.")
    release = Release.open(from_release) if from_release else None
    if release and release.record.arch == CUSTOM:
        raise ConfigError(
            "the release's network is its owner's own code; ask them for it and name it under [model] arch."
        )
    make_folder(folder, 0o755)
    vault = Vault.create(folder / "vault")
    write_text(config, _template(folder, release), 0o644)
    read_config(config)  # the template is tested where it is used
    if release:
        make_folder(vault.network)
        parts = [load_state(release.folder / "model" / f"{part}.safetensors") for part in ("featurizer", "classifier")]
        with replacing(vault.network / "phi.safetensors") as partial:
            save_state(partial, parts[0] | parts[1])
        write_json(vault.network / "network.json", release.record.model_dump(mode="json"))
    return vault


def _template(folder: Path, release: Release | None) -> str:
    name = "".join(letter if letter.isalnum() else "-" for letter in folder.resolve().name).strip("-") or "my-release"
    if release is None:
        preprocess = PreprocessRecord(
            size=(224, 224), resize=256, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
        )
        arch, hook, arguments = "resnet18", "conv4_1", {}
        weights = (
            '# weights = "phi.safetensors"   # .safetensors or a torch state_dict; without it, run `dpf-release train`'
        )
    else:
        record = release.record
        preprocess, arch, hook, arguments = record.preprocess, record.arch, record.hook, record.arguments
        weights = "# weights: those of the release are in the vault"
    pairs = ", ".join(f"{key} = {value}" for key, value in arguments.items())
    text = TEMPLATE.format(
        name=name[:64],
        arch=arch,
        hook=hook,
        weights=weights,
        size=list(preprocess.size),
        resize=preprocess.resize or 0,
        mean=list(preprocess.mean),
        std=list(preprocess.std),
        arguments=f"arguments = {{ {pairs} }}\n" if pairs else "",
    )
    if release is None:
        return text
    record = release.record
    if record.task == "regression":
        targets = f'kind = "regression"\ntargets = {_toml_list(record.targets)}\nunit = {_toml_text(record.unit)}'
        return text.replace(
            'kind = "classification"          # or "regression", with the columns of the CSV table:', targets
        )
    return text.replace('# classes = ["cat", "dog"]       # only', f"classes = {_toml_list(record.classes)}  # only")


def _toml_list(names: tuple[str, ...]) -> str:
    return "[" + ", ".join(map(_toml_text, names)) + "]"


def _toml_text(text: str) -> str:
    # A JSON string is a TOML basic string; both escape in the same way.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
