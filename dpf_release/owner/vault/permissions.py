"""What must hold of a vault before anything in it is read: it is its owner's alone, and git does not have it."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

from dpf_release.core.files import PRIVATE_FILE, PRIVATE_FOLDER
from dpf_release.errors import VaultError
from dpf_release.owner.vault.contents import listed

OTHERS = 0o077


def refuse_others(root: Path, *, fix: bool = False) -> None:
    """That no one but the owner has a right in a folder or to anything below it, and that nothing there is a link.

    The folder may be a link itself. With `fix`, the rights of others are taken away first.
    """
    if problems := list(_problems(root.resolve(), fix)):
        raise VaultError(
            f"the vault {root} is not its owner's alone; it holds what undoes every release. Found {len(problems)}: "
            f"{listed(problems, '; ')}. For the modes run the command again with --fix-permissions, or `chmod -R "
            f"go-rwx {root}`; replace links by what they point to, and take over what is another user's, or remove it."
        )


def _problems(root: Path, fix: bool) -> Iterator[str]:
    for path, found in _walk(root):
        kind, detail = problem_of(found)
        if kind == "readable" and fix:
            path.chmod(_expected(found))
        elif kind:
            yield f"{path.relative_to(root.parent)} {detail}"


def problem_of(found: os.stat_result) -> tuple[str, str]:
    """Why something is not its owner's alone: in a word, and in words that go after its name; both empty if it is."""
    if found.st_uid != os.geteuid():
        return "owner", f"is of user {found.st_uid}, not yours"
    if stat.S_ISLNK(found.st_mode):
        return "link", "is a link"
    if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
        return "special file", "is no file and no folder"
    if stat.S_IMODE(found.st_mode) & OTHERS:
        return "readable", f"has mode {stat.S_IMODE(found.st_mode):o}, expected {_expected(found):o}"
    return "", ""


def _expected(found: os.stat_result) -> int:
    return PRIVATE_FOLDER if stat.S_ISDIR(found.st_mode) else PRIVATE_FILE


def _walk(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """A folder and all that is below it; links and other users' folders are not entered."""
    # Another run may finish a partial file, or put a folder away, between two looks.
    with contextlib.suppress(FileNotFoundError):
        found = folder.lstat()
        yield folder, found
        if found.st_uid != os.geteuid():
            return
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    yield from _walk(folder / entry.name)
                    continue
                with contextlib.suppress(FileNotFoundError):
                    yield folder / entry.name, entry.stat(follow_symlinks=False)


def refuse_tracked(root: Path) -> None:
    """That git has no file of a folder in its index. Without git, and outside a repository, there is nothing to ask."""
    git = shutil.which("git")
    if git is None:
        return
    # Not the repository that a hook, whose child this may be, works in.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    environment |= {"LC_ALL": "C", "GIT_DISCOVERY_ACROSS_FILESYSTEM": "1"}
    ask = [git, "-c", "core.fsmonitor=false", "ls-files", "-z"]  # no program that the repository's configuration names
    asked = subprocess.run(ask, cwd=root, env=environment, capture_output=True, check=False, stdin=subprocess.DEVNULL)
    said = " ".join(os.fsdecode(asked.stderr).split())
    if asked.returncode and "not a git repository (or any" not in said:
        raise VaultError(
            f"git does not say whether it tracks files of the vault {root}: {said}. Whoever has the repository may "
            "have them. Let git read it, as you, or have the vault outside of it; then run the command again."
        )
    names = [os.fsdecode(name) for name in asked.stdout.split(b"\0") if name not in {b"", b".gitignore"}]
    if names:
        raise VaultError(
            f"git tracks {len(names)} files of the vault {root}: {listed(names)}. Whoever has "
            f"the repository has them. Run `git rm -r --cached {root}` and commit. The history keeps what was "
            "committed: rewrite it (git filter-repo), and where it was pushed treat those files as published."
        )
