"""The model record: what rebuilds φ1 and φ2 without running a stranger's code. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from dpf_release.core.bounded_json import Record, parse_json, read_json
from dpf_release.errors import VerificationError

CUSTOM = "custom"  # the public name of an owner's own network; the record never names an import

ClassName = Annotated[str, Field(min_length=1, max_length=200)]
Side = Annotated[int, Field(ge=8, le=4096)]
Positive = Annotated[float, Field(gt=0)]
Extent = Annotated[int, Field(ge=1, le=2**20)]


class PreprocessRecord(Record):
    """Resize of the shorter side (`None`: none), centre crop to `size` (H, W), then (x - mean) / std on [0, 1]."""

    size: tuple[Side, Side]
    resize: Side | None
    mean: tuple[float, float, float]
    std: tuple[Positive, Positive, Positive]


class ModelRecord(Record):
    """`model.json` of a release, and `network.json` of a vault (there `arch` may be an import of the owner's)."""

    format: Literal["dpf-release-model"] = "dpf-release-model"
    version: Literal[1] = 1
    arch: Annotated[str, Field(max_length=200)]
    arguments: dict[str, Annotated[int, Field(ge=1, le=65_536)]] = {}
    outputs: Annotated[int, Field(ge=1, le=1_000_000)]
    hook: Annotated[str, Field(max_length=200)]
    feature_shape: tuple[Extent, Extent, Extent]
    feature_dtype: Literal["float16"] = "float16"
    preprocess: PreprocessRecord
    task: Literal["classification", "regression"]
    classes: tuple[ClassName, ...] = ()
    targets: tuple[ClassName, ...] = ()
    unit: Annotated[str, Field(max_length=40)] = ""

    @model_validator(mode="after")
    def _names_match_outputs(self) -> ModelRecord:
        names = self.classes if self.task == "classification" else self.targets
        if len(names) != self.outputs:
            raise ValueError(f"{self.outputs} outputs, but {len(names)} names for them")
        return self

    @property
    def target_columns(self) -> int:
        """Columns of `/target` in a bank of this task; 0 where it holds labels."""
        return len(self.targets) if self.task == "regression" else 0


def read_model_record(path: Path, content: bytes | None = None) -> ModelRecord:
    """A model record from its file, or from its content where that was read already.

    Raises:
        VerificationError: no file, one too large, or not a record of format 1.
    """
    try:
        return read_json(path, ModelRecord) if content is None else parse_json(content, ModelRecord)
    except (OSError, ValueError) as error:
        raise VerificationError(f"{path} is not a model record of format 1: {error}. Fetch it again.") from error
