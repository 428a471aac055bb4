"""`init`: a folder with a commented `dpf.toml` and a vault."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from dpf_release.core.files import make_folder, write_text
from dpf_release.errors import ConfigError
from dpf_release.images.read import read_public
from dpf_release.models.weights import load_state, state_file
from dpf_release.owner.config import CONFIG_NAME, NetworkSection, read_config
from dpf_release.owner.vault.vault import Vault
from dpf_release.release.model_record import CUSTOM, ModelRecord
from dpf_release.release.release import Release

# As the template has them for an owner with a network of their own.
_TASK = """\
kind = "classification"          # or "regression", with the columns of the CSV table:
# targets = ["yaw_deg"]
# unit = "degrees\""""
_CLASSES = '# classes = ["cat", "dog"]       # only these, in this order'
_WEIGHTS = '# weights = "phi.safetensors"   # .safetensors or a torch state_dict; without it, run `dpf-release train`'


_TRAINED_ON_PUBLIC = """\
train_on = "public"              # φ1 never sees S, as the privacy bound needs; or "private", as in the paper
classifier = "from-bank"         # φ2 is trained on the released rows; or "trained": φ2 of the network"""
_PRETRAINED = """\
never_saw_private = true         # the owner's statement: these weights were trained without any image of S
classifier = "from-bank"         # φ2 is trained on the released rows; or "trained": φ2 of the network"""
_TRAINED_ON_PRIVATE = """\
train_on = "private"             # φ1 is trained on S: no privacy bound holds for what is published
classifier = "trained"           # or "from-bank": φ2 is trained on the released rows"""
NO_BOUND = (
    "φ1 will be trained on the private images: the public images have no classes to train on, and no weights were "
    "given that never saw the private images. So no privacy bound holds for what is published; what a release may "
    "claim then rests on attacks alone."
)


@dataclass(frozen=True)
class InitResult:
    """What `init` made: the `dpf.toml`, to be edited, and the folder of what is private.

    `warning` says what a release from here cannot promise; empty where nothing is lost.
    """

    config: Path
    vault: Path
    warning: str = ""


def init(
    folder: Path | str,
    *,
    from_release: Path | str | None = None,
    private: Path | str | None = None,
    public: Path | str | None = None,
    weights: Path | str | None = None,
    never_saw_private: bool = False,
) -> InitResult:
    """Makes `dpf.toml` and the vault in a folder.

    The function is `mixture`, and φ1 one that never sees S: trained on Q, or from weights. Where Q has no classes and
    there are no such weights, φ1 is to be trained on S.

    Args:
        folder: made where missing; must have no `dpf.toml`.
        private: the private images S; `public` and they are as `[images]` names them.
        public: the public images Q.
        weights: of a pretrained network.
        never_saw_private: the owner's statement, that no image of S was used to train them.
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
            "the release's network is its owner's own code; ask them for it and name it under [network] arch."
        )
    make_folder(folder, 0o755)
    vault = Vault.create(folder / "vault")
    warning = ""
    if weights:
        networks = _PRETRAINED if never_saw_private else _TRAINED_ON_PRIVATE
    else:
        labelled = public is None or bool(read_public(Path(public)).classes)
        networks = _TRAINED_ON_PUBLIC if labelled and not release else _TRAINED_ON_PRIVATE
    if networks is _TRAINED_ON_PRIVATE and not release:
        warning = NO_BOUND
    text = _template(folder, release.record if release else None, networks)
    for name, path in (("private", private), ("public", public)):
        if path:
            text = text.replace(f'path = "images/{name}"', f"path = {_toml(str(Path(path).resolve()))}")
    if weights:
        text = text.replace(_WEIGHTS, f"weights = {_toml(str(Path(weights).resolve()))}")
    write_text(config, text, 0o644)
    read_config(config)  # the template is tested where it is used
    if release:
        parts = [load_state(release.folder / "model" / f"{part}.safetensors") for part in ("featurizer", "classifier")]
        make_folder(vault.network)
        vault.write_bytes(vault.network / "phi.safetensors", state_file(parts[0] | parts[1]))
        vault.write_json(vault.network / "network.json", release.record.model_dump(mode="json"))
    return InitResult(config, vault.root, warning)


def _template(folder: Path, record: ModelRecord | None, networks: str) -> str:
    """The commented `dpf.toml`, with the network, the task and the classes of a release where there is one."""
    name = "".join(letter if letter.isalnum() else "-" for letter in folder.resolve().name).strip("-") or "my-release"
    model: ModelRecord | NetworkSection = record or NetworkSection()
    preprocess = record.preprocess if record else NetworkSection()
    pairs = ", ".join(f"{key} = {value}" for key, value in model.arguments.items())
    task, classes = _TASK, _CLASSES
    if record and record.task == "regression":
        task = f'kind = "regression"\ntargets = {_toml(record.targets)}\nunit = {_toml(record.unit)}'
    elif record:
        classes = f"classes = {_toml(record.classes)}  # only these, in this order"
    template = files("dpf_release.owner").joinpath(CONFIG_NAME).read_text(encoding="utf-8")
    return template.format(
        name=name[:64],
        task=task,
        classes=classes,
        arch=model.arch,
        networks=networks,
        bound="false" if networks is _TRAINED_ON_PRIVATE else "true ",
        hook=model.hook,
        weights="# weights: those of the release are in the vault" if record else _WEIGHTS,
        size=list(preprocess.size),
        resize=preprocess.resize or 0,
        mean=list(preprocess.mean),
        std=list(preprocess.std),
        arguments=f"arguments = {{ {pairs} }}\n" if pairs else "",
    )


def _toml(value: str | tuple[str, ...]) -> str:
    # A JSON string is a TOML basic string, and a list of them a list; both escape in the same way.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
