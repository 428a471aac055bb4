"""`dpf.toml`, the owner's configuration: its schema and its reader."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from dpf_release.core.files import read_at_most
from dpf_release.core.sizes import parse_size
from dpf_release.errors import ConfigError

CONFIG_NAME = "dpf.toml"
MAX_BYTES = 2**20
# The parser's time and memory grow with the square of the parts of a key; ours have two.
MAX_KEY_PARTS = 16
MAX_SHOWN = 50
_PART = r"""(?:[A-Za-z0-9_-]+|"[^"\n]*"|'[^'\n]*')"""
_LONG_KEY = re.compile(rf"(?<![A-Za-z0-9_-])(?:{_PART}[ \t]*\.[ \t]*){{{MAX_KEY_PARTS}}}")

# Names become folder names and, for a release, public text: nothing that needs escaping anywhere.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Epochs = Annotated[int, Field(ge=1, le=10_000, strict=True)]
BatchSize = Annotated[int, Field(ge=2, le=65_536, strict=True)]
Rate = Annotated[float, Field(gt=0.0, le=10.0)]
Side = Annotated[int, Field(ge=8, le=4096, strict=True)]
Deviation = Annotated[float, Field(gt=0.0)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ReleaseSection(_Section):
    """What the published folder is called; all of it becomes public."""

    name: Name = "my-release"
    version: Name = "1.0.0"
    licence: Name = "other"
    description: Annotated[str, Field(max_length=2000)] = ""


class TaskSection(_Section):
    """The target task of Φ: `classification`, or `regression` onto columns of a CSV table."""

    kind: Literal["classification", "regression"] = "classification"
    targets: tuple[str, ...] = ()
    unit: Annotated[str, Field(max_length=40)] = ""
    ranges: tuple[tuple[float, float], ...] = ()

    @model_validator(mode="after")
    def _targets_belong_to_regression(self) -> TaskSection:
        if len(set(self.targets)) != len(self.targets):
            raise ValueError("`targets` lists a column twice")
        if (self.kind == "regression") != bool(self.targets):
            raise ValueError("`targets` lists the target columns of a regression task, and of no other")
        if self.ranges and (len(self.ranges) != len(self.targets) or any(low >= high for low, high in self.ranges)):
            raise ValueError("`ranges` has a lowest and a highest value for each of `targets`, in their order")
        return self


class PrivateImagesSection(_Section):
    """S, the private images: an ImageFolder tree or a CSV table."""

    path: Path = Path("images/private")
    classes: tuple[str, ...] = ()
    group: str | None = None
    val_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    test_fraction: Fraction = 0.1
    seed: int = 0
    max_bad: Fraction = 0.001

    @model_validator(mode="after")
    def _some_are_left_to_train_on(self) -> PrivateImagesSection:
        if self.val_fraction + self.test_fraction >= 1:
            raise ValueError("val_fraction and test_fraction leave nothing to train on")
        return self


class PublicImagesSection(_Section):
    """Q, the public images: any folder of pictures, or a CSV table with a `path` column."""

    path: Path = Path("images/public")
    classes: tuple[str, ...] = ()
    max_bad: Fraction = 0.001


class ImagesSection(_Section):
    """Where the images are."""

    private: PrivateImagesSection = PrivateImagesSection()
    public: PublicImagesSection = PublicImagesSection()


class NetworkSection(_Section):
    """Φ, its preprocessing, and the hook point where it is cut."""

    arch: str = "resnet18"
    arguments: dict[str, int] = {}
    weights: Path | None = None
    never_saw_private: Annotated[bool, Field(strict=True)] = False
    train_on: Literal["private", "public"] = "private"
    classifier: Literal["trained", "from-bank"] = "trained"
    hook: str = "conv4_1"
    size: tuple[Side, Side] = (224, 224)
    resize: Annotated[int, Field(ge=0, le=4096)] = 256
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[Deviation, Deviation, Deviation] = (0.229, 0.224, 0.225)


class TrainSection(_Section):
    """How `train` fits Φ, and `poison` a φ2 from the bank (SGD with momentum 0.9, one-cycle learning rate)."""

    epochs: Epochs = 30
    batch_size: BatchSize = 128
    learning_rate: Rate = 0.1
    weight_decay: Annotated[float, Field(ge=0.0, le=1.0)] = 5e-4
    flip: Annotated[bool, Field(strict=True)] = True
    shift: Annotated[int, Field(ge=0, le=512)] = 0
    classifier_epochs: Epochs = 8
    classifier_learning_rate: Rate = 0.05


class ReconstructorSection(_Section):
    """How a straw man is fitted (Adam, one-cycle learning rate)."""

    epochs: Epochs = 10
    batch_size: BatchSize = 128
    learning_rate: Rate = 3e-3


class PoisonSection(_Section):
    """Which poisoning function P is fitted, against whom, and how."""

    function: str = "dpf"
    objective: Literal["equivalence", "paper"] = "equivalence"
    lambda_: Annotated[float, Field(alias="lambda", ge=0.0, le=1e6)] = 1.0
    straw_men: tuple[str, ...] = ("px2s2",)
    confuse: tuple[str, ...] = ()
    epochs: Epochs = 10
    batch_size: BatchSize = 128
    learning_rate: Rate = 3e-3


class BankSection(_Section):
    """How feature banks are written."""

    shard_size: str = "1 GiB"
    compression: Literal["none", "gzip"] = "none"
    batch_size: BatchSize = 128

    @field_validator("shard_size")
    @classmethod
    def _is_a_size(cls, value: str) -> str:
        parse_size(value)
        return value


class PrivacySection(_Section):
    """The privacy budget of these images: what all releases of them together may spend. None: not limited."""

    epsilon: Annotated[float, Field(gt=0.0, le=1e6)] | None = None
    delta: Annotated[float, Field(gt=0.0, le=0.1)] = 1e-5


class ClaimsSection(_Section):
    """What the release promises. `package` refuses a claim that the attacks of `[gate] profile` do not bear out."""

    reconstruction: Annotated[bool, Field(strict=True)] = True
    linkage: Annotated[bool, Field(strict=True)] = False
    attribute: str | None = None
    bound: Annotated[bool, Field(strict=True)] = False

    @property
    def made(self) -> tuple[Literal["reconstruction", "linkage", "attribute", "bound"], ...]:
        """The names of the claims that are made."""
        asked = {"reconstruction": self.reconstruction, "linkage": self.linkage, "attribute": self.attribute}
        asked["bound"] = self.bound
        return tuple(name for name, is_made in asked.items() if is_made)  # type: ignore[misc]


class GateSection(_Section):
    """What a claim must pass, and below which limits (shares from 0 to 1)."""

    profile: Literal["quick", "standard", "full"] = "standard"
    leakage: Fraction = 0.1
    re_identification: Fraction = 0.05
    top1: Fraction = 0.05
    auc: Annotated[float, Field(ge=0.5, le=1.0)] = 0.6
    tpr: Fraction = 0.03
    attribute: Fraction = 0.05

    @property
    def limits(self) -> dict[str, float]:
        """All but the profile."""
        return self.model_dump(exclude={"profile"})


class ComputeSection(_Section):
    """The machine: `auto` takes a GPU where there is one, and bfloat16 where that has instructions for it.

    `workers` processes decode (0: threads of this one).
    """

    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?|mps)$")] = "auto"
    workers: Annotated[int, Field(ge=0, le=256)] | None = None
    bf16: Literal["auto", "on", "off"] = "auto"


class Config(_Section):
    """The whole of `dpf.toml`; `folder` is where it lies and what its paths are relative to."""

    release: ReleaseSection = ReleaseSection()
    task: TaskSection = TaskSection()
    images: ImagesSection = ImagesSection()
    network: NetworkSection = NetworkSection()
    train: TrainSection = TrainSection()
    reconstructor: ReconstructorSection = ReconstructorSection()
    poison: PoisonSection = PoisonSection()
    privacy: PrivacySection = PrivacySection()
    bank: BankSection = BankSection()
    claims: ClaimsSection = ClaimsSection()
    gate: GateSection = GateSection()
    compute: ComputeSection = ComputeSection()
    folder: Path = Field(default=Path(), exclude=True)

    def locate(self, path: Path) -> Path:
        """A path of the configuration, absolute."""
        return (self.folder / path.expanduser()).resolve()

    def with_options(self, options: Mapping[str, Any]) -> Config:
        """The configuration with options laid over it, by dotted keys as `read_config` takes them."""
        tree = self.model_dump(by_alias=True)
        _lay_over(tree, options)
        return parse_config(tree, self.folder, str(self.folder / CONFIG_NAME))


def read_config(path: Path, overrides: Mapping[str, Any] | None = None) -> Config:
    """`dpf.toml` with options laid over it: dotted keys (`"poison.epochs"`); `None` values are passed over.

    Raises:
        ConfigError: no file, not TOML, or keys that do not fit; all of them at once.
    """
    if not path.is_file():
        raise ConfigError(
            f"expected a configuration at {path}, found none. Run `dpf-release init DIR` to make one, "
            "change into its folder, or name it with --config."
        )
    try:
        text = read_at_most(path, MAX_BYTES).decode("utf-8")
        if _LONG_KEY.search(text):
            raise ValueError(f"a key has more than {MAX_KEY_PARTS} parts")
        tree = tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read as a configuration: {error}.") from error
    except RecursionError as error:
        raise ConfigError(f"{path} is not a configuration: it is nested too deeply. Correct it.") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not TOML: {error}. Correct that line.") from error
    _lay_over(tree, overrides or {})
    return parse_config(tree, path.parent.resolve(), str(path))


def parse_config(tree: Mapping[str, Any], folder: Path, source: str = CONFIG_NAME) -> Config:
    """A configuration from parsed TOML; or a `ConfigError` with every key that does not fit."""
    if "folder" in tree:
        raise ConfigError(f"{source}: `folder` is not a key of the configuration. Remove it.")
    try:
        return Config.model_validate({**tree, "folder": folder})
    except ValidationError as error:
        lines = [
            f"  {'.'.join(str(part) for part in problem['loc'])}: {problem['msg']}"
            + ("" if problem["type"] in {"missing", "extra_forbidden"} else f" (found {_shown(problem['input'])})")
            for problem in error.errors()[:MAX_SHOWN]
        ]
        raise ConfigError(f"{source} does not fit:\n" + "\n".join(lines)) from error


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python does not write numbers of thousands of digits
        return "a very large number"
    return text if len(text) <= 200 else text[:200] + " ..."


def _lay_over(tree: dict[str, Any], options: Mapping[str, Any]) -> None:
    for dotted, value in options.items():
        if value is None:
            continue
        *sections, key = dotted.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise ConfigError(f"`{dotted}` is given, but the configuration has no section [{section}].")
        place[key] = value
