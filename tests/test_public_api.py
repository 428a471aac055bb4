"""`from dpf_release import ...`: the exact names, each with a docstring whose example runs."""

from __future__ import annotations

import doctest
import inspect
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

import dpf_release
from dpf_release import errors
from dpf_release.attacks.interface import ATTACKS
from dpf_release.poisoning.interface import FUNCTIONS

ERRORS = {
    name for name, found in vars(errors).items() if inspect.isclass(found) and issubclass(found, errors.DPFReleaseError)
}
STEPS = {
    "init",
    "train",
    "featurize",
    "fit_poison",
    "poison",
    "privacy",
    "attack",
    "package",
    "verify",
    "audit",
    "retract",
}
NAMES = {
    "Release",
    "FeatureBank",
    "concat",
    "Project",
    *STEPS,
    "PoisoningFunction",
    "Attack",
    "register_function",
    "register_attack",
    *ERRORS,
}


def test_the_public_names_are_exactly_these() -> None:
    assert set(dpf_release.__all__) == NAMES | {"__version__"}
    assert set(dir(dpf_release)) >= NAMES
    with pytest.raises(AttributeError, match="has no attribute 'unpublished'"):
        _ = dpf_release.unpublished


@pytest.mark.parametrize("name", sorted(STEPS))
def test_an_option_of_a_step_has_a_name_and_a_default(name: str) -> None:
    first, *options = inspect.signature(getattr(dpf_release, name)).parameters.values()
    assert first.default is inspect.Parameter.empty
    assert [option.name for option in options if option.default is inspect.Parameter.empty] == []


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_public_name_has_a_docstring_with_an_example_that_runs(
    name: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = getattr(dpf_release, name)
    (example,) = doctest.DocTestFinder(recurse=False).find(found, name, module=False, globs={})
    if "my-release" in example.docstring:
        shutil.copytree(finished, tmp_path / "my-release")
    assert f"{name}" in example.docstring.partition(">>>")[2]
    with mock.patch.dict(FUNCTIONS), mock.patch.dict(ATTACKS):  # what the example registers is for it alone
        runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.IGNORE_EXCEPTION_DETAIL)
        said: list[str] = []
        failed, tried = runner.run(example, out=said.append)
    assert (failed, "".join(said)) == (0, "")
    assert tried > 0


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import sys, dpf_release; dpf_release.VaultError; print(set(sys.modules) & {'torch', 'numpy', 'pydantic'})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
