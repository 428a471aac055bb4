"""The order of the packages: each imports from those before it only, and what must answer at once loads no torch."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import dpf_release

ROOT = Path(dpf_release.__file__).parent
ORDER = (
    "errors", "core", "bank", "images", "models", "poisoning", "release", "attacks", "owner", "evaluation", "publish",
    "cli",
)  # fmt: skip
ABOVE = {"__init__": len(ORDER), "__main__": len(ORDER)}  # which hand on what others define
HEAVY = {
    "torch",
    "torchvision",
    "torchmetrics",
    "timm",
    "scipy",
    "sklearn",
    "dp_accounting",
    "opacus",
}  # seconds to import
# What a reader with NumPy alone, or someone who verifies a release, imports; and what looks after a vault.
WITHOUT_TORCH = (
    "bank.drop_rows",
    "bank.format",
    "bank.hdf5_check",
    "bank.procedure_format",
    "bank.reader",
    "bank.rows",
    "bank.writer",
    "core.arrays",
    "core.bounded_json",
    "core.files",
    "core.html",
    "core.locks",
    "core.memory",
    "core.progress",
    "core.read_ahead",
    "core.sizes",
    "owner.config",
    "owner.vault.age",
    "owner.vault.contents",
    "owner.vault.ledger",
    "owner.vault.permissions",
    "owner.vault.retractions",
    "owner.vault.sealing",
    "owner.vault.staging",
    "owner.vault.storage",
    "owner.vault.vault",
    "release.attack_report",
    "release.checked_files",
    "release.child_process",
    "release.contents",
    "release.croissant",
    "release.manifest",
    "release.model_record",
    "release.safetensors_check",
    "release.signing",
    "release.tree",
    "release.verify",
)


def _modules() -> dict[str, str]:
    """Source of each module, by its dotted name below `dpf_release`; a package's is that of its `__init__`."""
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
        found[name] = path.read_text(encoding="utf-8")
    return found


MODULES = _modules()


def _imported(source: str) -> Iterator[tuple[str, str]]:
    """Pairs of a module and a name that is imported from it, wherever in the file; the name is empty for `import x`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from ((str(node.module), alias.name) for alias in node.names)


def _ours(source: str) -> Iterator[tuple[str, str]]:
    """Of these, our own: the module below `dpf_release` that is meant, and the name."""
    for module, name in _imported(source):
        if module.split(".")[0] == "dpf_release":
            below = module.partition(".")[2]
            inside = f"{below}.{name}" if below else name
            yield (inside, "") if inside in MODULES else (below or "__init__", name)


def _rank(module: str) -> int:
    top = module.split(".")[0]
    return ABOVE[top] if top in ABOVE else ORDER.index(top)


def _violations(module: str, source: str) -> list[str]:
    found = []
    for other, name in _ours(source):
        if _rank(other) > _rank(module):
            found.append(f"{module} imports {other}, which comes after it")
        if name.startswith("_") and not name.startswith("__"):
            found.append(f"{module} imports {name}, a private name of {other}")
    return found


def _needs(module: str, known: set[str] | None = None) -> set[str]:
    """All that an import of a module loads: of ours by their names, of others the top of it."""
    known = set() if known is None else known
    if module in known:
        return known
    known.add(module)
    for parent in [module.rpartition(".")[0]] if "." in module else []:
        _needs(parent, known)
    tree = ast.parse(MODULES[module])
    for node in tree.body:  # what stands in a function is loaded when that runs
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            text = ast.unparse(node)
            for other, _ in _ours(text):
                _needs(other, known)
            known |= {name.split(".")[0] for name, _ in _imported(text)}
            known |= {name for name, _ in _imported(text) if name == "safetensors.torch"}
    return known


def test_every_module_has_a_place_in_the_order() -> None:
    assert {name.split(".")[0] for name in MODULES} == {*ORDER, *ABOVE}


def test_a_package_imports_from_those_before_it_and_no_private_names() -> None:
    assert [line for module, source in MODULES.items() for line in _violations(module, source)] == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("bank.reader", "from dpf_release.images.table import ImageTable"),
        ("core.files", "from dpf_release import bank"),
        ("models.zoo", "import dpf_release.poisoning.chain"),
        ("attacks.a05_linkage", "from dpf_release.owner.vault.vault import Vault"),
        ("evaluation.suite", "def run():\n    from dpf_release.publish.gate import pass_gate"),
        ("publish.package", "if TYPE_CHECKING:\n    from dpf_release.cli.app import app"),
        ("owner.project", "from dpf_release import Release"),
        ("publish.package", "from dpf_release.core.files import _writing"),
    ],
)
def test_an_import_from_above_or_of_a_private_name_is_noticed(module: str, source: str) -> None:
    assert len(_violations(module, source)) == 1
    assert _violations("__main__", source.replace("_writing", "writing")) == []


def test_no_attack_imports_another() -> None:
    attacks = [name for name in MODULES if re.match(r"attacks\.a\d\d_", name)]
    assert len(attacks) >= 12
    for name in attacks:
        assert [other for other, _ in _ours(MODULES[name]) if other in attacks] == [], name


def test_no_module_imports_itself_by_a_detour() -> None:
    edges = {name: {other for other, _ in _ours(source) if other not in ABOVE} for name, source in MODULES.items()}
    # A package and what lies in it are one: Python runs the package first.
    edges = {name: {other for other in others if not name.startswith(f"{other}.")} for name, others in edges.items()}
    assert _circles(edges) == []
    assert _circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]


def _circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """What is left when whatever imports nothing that is left, or is imported by nothing that is left, has gone."""
    left = dict(edges)
    while True:
        imported = {other for name in left for other in left[name]}
        ends = {name for name in left if not left[name] & left.keys() or name not in imported}
        if not ends:
            return [sorted(left)] if left else []
        left = {name: others for name, others in left.items() if name not in ends}


def test_reading_a_bank_verifying_a_release_and_looking_after_a_vault_need_no_torch() -> None:
    found = {name: _needs(name) & (HEAVY | {"safetensors.torch"}) for name in WITHOUT_TORCH}
    assert {name: heavy for name, heavy in found.items() if heavy} == {}
    assert "torch" in _needs("bank.dataset")  # the control


@pytest.mark.parametrize("module", ["bank.reader", "release.verify", "release.contents", "owner.vault.vault"])
def test_what_needs_no_torch_loads_none(module: str) -> None:
    code = f"import sys, dpf_release.{module}; print(sorted(set(sys.modules) & {HEAVY!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


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
    assert {"typer", "dpf_release.cli.main"} <= imported
    assert not {name for name in imported if name.split(".")[0] in {"torch", "torchvision", "numpy"}}
