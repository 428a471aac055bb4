"""How large the code is and how it hangs together, for several states of it side by side.

    python benchmarks/house.py 86cfac7 HEAD .

Each argument is a folder with a checkout, or a revision of the repository that this file lies in. Only `.py` files
below `dpf_release` are counted. An import counts wherever it stands, inside functions and under `TYPE_CHECKING` too; a
module at the top level, as `errors`, is a package of its own here. A function's lines include its docstring.
"""

from __future__ import annotations

import argparse
import ast
import io
import subprocess
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

PACKAGE = "dpf_release"
LONG = 40
ORDER = (
    *("errors", "core", "bank", "images", "models", "poisoning", "release", "attacks"),
    *("owner", "evaluation", "publish", "cli"),
)
ABOVE = ("__init__", "__main__")  # they may import all, and are no packages


@dataclass(frozen=True, eq=False)
class House:
    """The modules of one state of the code.

    Attributes:
        sources: name below the package (`bank.reader`; `bank` for its `__init__`) → source.
    """

    sources: Mapping[str, str]

    @classmethod
    def of(cls, state: str) -> House:
        """Of a folder or a revision."""
        folder = Path(state)
        if folder.is_dir():
            texts = {path.relative_to(folder): path.read_bytes() for path in (folder / PACKAGE).rglob("*.py")}
        else:
            texts = dict(_committed(state))
        return cls({_name(path): text.decode() for path, text in texts.items()})

    @cached_property
    def trees(self) -> dict[str, ast.Module]:
        """Each module, parsed."""
        return {name: ast.parse(source) for name, source in self.sources.items()}

    @cached_property
    def edges(self) -> dict[str, set[str]]:
        """Each module → those of ours that it imports; a package that a module lies in is not counted."""
        found = {name: set(self._imports(tree)) for name, tree in self.trees.items()}
        return {
            name: {other for other in others if other != name and not name.startswith(f"{other}.")}
            for name, others in found.items()
        }

    def _imports(self, tree: ast.Module) -> Iterator[str]:
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                wanted = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                wanted = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            for path in wanted:
                top, _, below = path.partition(".")
                if top == PACKAGE:
                    inner = next((part for part in (below, below.rpartition(".")[0]) if part in self.sources), None)
                    yield inner or "__init__"

    def counts(self) -> dict[str, str]:
        """One row of the table each."""
        between = {
            (name, other) for name, others in self.edges.items() for other in others if _top(name) != _top(other)
        }
        between = {(name, other) for name, other in between if not {_top(name), _top(other)} & {*ABOVE}}
        packages = {(_top(name), _top(other)) for name, other in between}
        known = {_top(name) for name in self.sources} <= {*ORDER, *ABOVE}
        upward = [1 for one, other in between if known and ORDER.index(_top(other)) > ORDER.index(_top(one))]
        return {
            "modules": f"{len(self.sources)}",
            f"lines of {PACKAGE}": f"{sum(source.count(chr(10)) for source in self.sources.values()):,}",
            "modules at the top level": f"{sum(self._is_at_the_top(name) for name in self.sources)}",
            "packages": f"{len({_top(name) for name in self.sources} - {*ABOVE})}",
            "modules that import Project": f"{sum(_imports_project(tree) for tree in self.trees.values())}",
            "modules that mention sealing": f"{sum('seal' in source.lower() for source in self.sources.values())}",
            f"functions over {LONG} lines": f"{sum(_long_functions(tree) for tree in self.trees.values())}",
            "imports from module to module": f"{sum(map(len, self.edges.values()))}",
            "of these, between packages": f"{len(between)}",
            "pairs of packages": f"{len(packages)}",
            "upward imports": f"{len(upward)}" if known else "no order yet",
            "circles of modules": f"{len(self.circles())}",
        }

    def _is_at_the_top(self, name: str) -> bool:
        return "." not in name and not any(other.startswith(f"{name}.") for other in self.sources)

    def circles(self) -> list[set[str]]:
        """Sets of modules each of which imports, by detours, all others of the set."""
        reached = {name: self._reached(name) for name in self.edges}
        found: list[set[str]] = []
        for name, others in reached.items():
            circle = {other for other in others if name in reached[other]}
            if len(circle) > 1 and circle not in found:
                found.append(circle)
        return found

    def _reached(self, name: str) -> set[str]:
        reached: set[str] = set()
        left = [name]
        while left:
            new = self.edges[left.pop()] - reached - {*ABOVE}
            reached |= new
            left += new
        return reached


def _committed(revision: str) -> Iterator[tuple[Path, bytes]]:
    command = ["git", "-C", str(Path(__file__).parent.parent), "archive", revision, PACKAGE]
    archive = subprocess.run(command, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as members:
        for member in members:
            if member.name.endswith(".py") and (file := members.extractfile(member)):
                yield Path(member.name), file.read()


def _name(path: Path) -> str:
    parts = path.with_suffix("").parts[1:]
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def _top(name: str) -> str:
    return name.split(".")[0]


def _imports_project(tree: ast.Module) -> bool:
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return any(alias.name == "Project" for node in imports for alias in node.names)


def _long_functions(tree: ast.Module) -> int:
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return sum((node.end_lineno or 0) - node.lineno + 1 > LONG for node in functions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("states", nargs="+", metavar="STATE", help="a folder, or a revision")
    states = parser.parse_args().states
    columns = [House.of(state).counts() for state in states]
    print("| | " + " | ".join(states) + " |")
    print("|---|" + "---:|" * len(states))
    for row in columns[0]:
        print(f"| {row} | " + " | ".join(column[row] for column in columns) + " |")


if __name__ == "__main__":
    main()
