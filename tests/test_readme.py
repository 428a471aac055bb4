"""What the README and the docs show, run."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
from typer.main import get_command

from commands import run_cli
from dpf_release.cli.main import app
from dpf_release.poisoning.chain import markdown
from dpf_release.poisoning.interface import FUNCTIONS
from dpf_release.release.attack_report import AttackReport
from places import ROOT

DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_the_downstream_example_of_the_readme_runs(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, code = blocks(README, "python")
    (tmp_path / "release").symlink_to(finished / "release")
    (tmp_path / "my-picture.jpg").write_bytes(
        (finished / "images" / "private" / "disc" / "disc-portrait-001.png").read_bytes()
    )
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["features_of_mine"].shape == (1, *names["release"].record.feature_shape)
    features, targets = next(iter(names["loader"]))
    assert len(features) == len(targets) > 1


def test_the_owner_s_example_of_the_readme_runs(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _ = blocks(README, "python")
    shutil.copytree(finished, tmp_path / "my-release")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert len(json.loads(capsys.readouterr().out)) == 2


def test_every_command_and_option_that_the_readme_shows_exists() -> None:
    commands = get_command(app).commands
    shown = re.findall(r"dpf-release ([a-z-]+)((?: [^#`\n&]+)?)", README)
    assert {name for name, _ in shown} >= {"init", "train", "featurize", "fit-poison", "poison", "package", "verify"}
    for name, rest in shown:
        assert name in commands, name
        words, command = shlex.split(rest), commands[name]
        if hasattr(command, "commands"):  # a group, as `key`
            command = command.commands[words[0]]
        options = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= options


def test_the_auditors_commands_of_the_readme_run(finished: Path) -> None:
    for arguments in (["verify", "release"], ["audit", "release"], ["inspect", "release"]):
        assert f"dpf-release {' '.join(arguments)}" in README
        assert run_cli(*arguments, folder=finished).returncode == 0


def test_ci_runs_the_tests_as_the_readme_does() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    assert 'pip install -e ".[test]" && .venv/bin/python -m pytest -n 2' in README
    assert 'install --quiet --no-cache-dir -e ".[test]"' in script
    assert '"$work/venv/bin/python" -m pytest -n 2' in script


def test_the_docs_have_the_functions_as_they_are_declared_and_their_example_works() -> None:
    text = (ROOT / "docs" / "functions.md").read_text(encoding="utf-8")
    assert f"<!-- dpf-release functions -->\n{markdown()}<!-- end -->" in text
    assert "| `recombine` | k | 5 |" in markdown()
    (code,) = blocks(text, "python")
    try:
        exec(compile(code, "functions.md", "exec"), {})
        assert "sign-flip" in FUNCTIONS
    finally:
        FUNCTIONS.pop("sign-flip", None)


@pytest.mark.parametrize("page", ["attacks-cifar10", "attacks-lfw"])
def test_the_tables_of_attacks_say_what_the_published_numbers_say(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text, data = (DOCS / f"{page}.md").read_text(encoding="utf-8"), DOCS / page
    example = imported(ROOT / "examples" / page.removeprefix("attacks-"), monkeypatch)
    reports = {
        path.name.removesuffix("-standard.json"): AttackReport.model_validate_json(path.read_bytes())
        for path in data.glob("*-standard.json")
    }
    assert len(reports) == 4
    if page == "attacks-lfw":
        tables = [example.table(reports)]
    else:
        tables = [example.tables(report) for report in reports.values()]
        tables.append(example.beside(data, data / "again", "standard"))
    lines = [line for table in tables for line in table.splitlines()]
    assert len(lines) > 5
    assert [line for line in lines if line not in text.splitlines()] == []
    changed = re.sub(r"(?<=0\.)\d", lambda digit: str((int(digit[0]) + 1) % 10), text)
    assert any(line not in changed.splitlines() for line in lines)


def imported(folder: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`attack.py` of an example, with what lies beside it."""
    monkeypatch.syspath_prepend(str(folder))
    for name in ("run", "attack"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module("attack")
    for name in ("run", "attack"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return module


def test_the_card_s_example_is_valid_python(finished: Path) -> None:
    (code,) = blocks((finished / "release" / "README.md").read_text(encoding="utf-8"), "python")
    compile(code, "card", "exec")
    assert "Claims made: **none**" in (finished / "release" / "README.md").read_text(encoding="utf-8")
