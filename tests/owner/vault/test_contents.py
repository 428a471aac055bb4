"""Every file that a command writes into a vault is known by its name, and nothing else is."""

from __future__ import annotations

import pytest

from dpf_release.owner.vault.contents import MEMBERS, at_rest, role_in_vault


@pytest.mark.parametrize("name", ["reports/frontier.json", "reports/frontier.svg", "reports/frontier.png"])
def test_what_compare_writes_can_be_sealed(name: str) -> None:
    assert MEMBERS.fullmatch(name)
    assert role_in_vault(name) == role_in_vault(name + ".age") != role_in_vault("reports/other.json")
    assert not MEMBERS.fullmatch("reports/other.json")


def test_whether_a_file_is_sealed_follows_from_its_name() -> None:
    assert [at_rest(name) for name in ("ids.csv.age", "ids.csv")] == ["sealed", "in the clear"]


@pytest.mark.parametrize("name", [".gitignore", "sealed.json", "ids.csv.partial", "notes.txt"])
def test_what_is_no_member_is_never_sealed(name: str) -> None:
    assert not MEMBERS.fullmatch(name)
