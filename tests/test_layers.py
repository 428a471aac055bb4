"""The order of the layers: low ones know nothing of high ones, and the command line answers without torch."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dpf_release

ROOT = Path(dpf_release.__file__).parent
ORDER = [
    "errors",
    "storage tree schema digests ahead age guard config vault staging sealing manifest croissant signing verification "
    "limits shard_layout tensor_file attack_report bank bank_writer bank_drop record retracted progress "
    "structure pages",
    "ranks metrics image_table images pictures figures loader models objective release",
    "training",
    "attacks",
    "pipeline downstream",
    "battery",
    "package gate leaks near_rows card inspection audit",
    "cli demo __main__ __init__",
]
LAYER = {name: number for number, names in enumerate(ORDER) for name in names.split()}
TORCH = {"torch", "torchvision", "torchmetrics", "safetensors.torch"}
FIRST_LAYER_WITH_TORCH = 2


def _layer_of(module: str) -> int:
    """The layer of `dpf_release.x.y`; `dpf_release` itself is its `__init__`."""
    return LAYER[(module.split(".") + ["__init__"])[1]]


def _imports(source: str) -> set[str]:
    """Modules that a file imports, wherever in it; `from dpf_release import x` is x, where x is a file."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            inside = {name.name for name in node.names if name.name in LAYER} if node.module == "dpf_release" else ()
            found |= {f"dpf_release.{name}" for name in inside} or {str(node.module)}
    return found


def _violations(module: str, source: str) -> list[str]:
    own = _layer_of(module)
    return [
        f"{module} (layer {own}) imports {name}"
        for name in sorted(_imports(source))
        if (name.split(".")[0] == "dpf_release" and _layer_of(name) > own)
        or (own < FIRST_LAYER_WITH_TORCH and (name in TORCH or name.split(".")[0] in TORCH))
    ]


def _modules() -> dict[str, Path]:
    return {
        ".".join(["dpf_release", *path.relative_to(ROOT).with_suffix("").parts]): path for path in ROOT.rglob("*.py")
    }


def test_every_file_has_a_layer() -> None:
    assert {name.split(".")[1] for name in _modules()} == set(LAYER)


def test_a_file_imports_from_its_own_layer_or_a_lower_one() -> None:
    assert [line for name, path in _modules().items() for line in _violations(name, path.read_text("utf-8"))] == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("dpf_release.bank", "from dpf_release.loader import concat"),
        ("dpf_release.bank", "def read():\n    import torch.nn"),
        ("dpf_release.storage", "from safetensors.torch import save_file"),
        ("dpf_release.models.zoo", "import dpf_release.training"),
        ("dpf_release.training", "from dpf_release import pipeline"),
        ("dpf_release.pipeline.banks", "from dpf_release import Release"),
        ("dpf_release.package", "if TYPE_CHECKING:\n    from dpf_release.cli import app"),
    ],
)
def test_an_import_from_above_is_noticed(module: str, source: str) -> None:
    assert len(_violations(module, source)) == 1
    assert _violations("dpf_release.cli", source) == []


@pytest.mark.parametrize("arguments", [["--help"], ["verify", "--help"]], ids=" ".join)
def test_help_imports_no_torch(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "dpf_release", *arguments],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "verify" in done.stdout
    imported = set(re.findall(r"(?m)^import time:.*\| +(\S+)$", done.stderr))
    assert {"typer", "dpf_release.cli"} <= imported
    assert not {name for name in imported if name.split(".")[0] in {"torch", "torchvision", "numpy"}}
