"""Whether a release says a name that is its owner's alone: of a source file, a person, a machine, a folder."""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import platform
import pwd
import re
import subprocess
import unicodedata
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import chain, islice
from pathlib import Path, PurePosixPath
from typing import Any

from dpf_release.attacks.interface import registered
from dpf_release.bank.format import BankIndex
from dpf_release.core.bounded_json import MAX_BYTES
from dpf_release.errors import VerificationError
from dpf_release.models.zoo import public_architectures
from dpf_release.owner.privacy import PRIVACY_LEDGER
from dpf_release.owner.project import Project
from dpf_release.owner.vault.retractions import RETRACTED
from dpf_release.owner.vault.vault import Vault
from dpf_release.poisoning.interface import FUNCTIONS
from dpf_release.poisoning.plan import FeatureSpec
from dpf_release.publish.card_text import fixed_card_text
from dpf_release.publish.leaks.findings import Sources, public_files
from dpf_release.release.attack_report import AttackReport
from dpf_release.release.croissant import CONTEXT
from dpf_release.release.manifest import MANIFEST, ROLES, SUMS, Manifest
from dpf_release.release.model_record import ModelRecord
from dpf_release.release.safetensors_check import read_tensor_file
from dpf_release.release.tree import Tree
from dpf_release.release.verify import Problem

NAME_LENGTH = 6  # of a source file's name, at the least
ACCOUNT_LENGTH = 4  # of a user, host or home folder; a shorter one is found in the paths only
COMMON_ACCOUNTS = frozenset({"root", "user", "users", "home", "admin", "ubuntu", "debian", "nobody", "localhost"})
SHOWN, MOST_COMPARED = 10, 1000  # names that one file says
# Keys of the vault's records with digests of what is published; all other digests are private.
PUBLIC_DIGESTS = frozenset(
    {
        "featurizer_sha256",
        "classifier_sha256",
        "index_sha256",
        "published_index",
        "dropped_from",
        "manifest_sha256",
    }  # fmt: skip
)

_RUN = re.compile(r"[^\W_]+")
_HEX = re.compile(r"(?=([0-9a-f]{64}))")  # each 64 digits of a longer run too
_IN_VAULT = re.compile(
    r"(?<![^\W_])vault/(?:network|(?:public_)?features|reconstructors|functions|candidates|attackers|reports|retracted\.json|"
    r"ids\.csv|ledger\.json|privacy\.json|survey-)"
)


def private_words(release: Path, project: Project, sources: Sources | None = None) -> list[Problem]:
    """Names of source files, paths, accounts, e-mail addresses, secrets and private digests in what a release says.

    Looked for at word bounds, whatever the case: the file name, its stem and its path under the root of S, of 6
    characters or more; user, host and home folder names of 4 or more; paths of the vault, the project, S and the home
    folder; the e-mail addresses of the git configuration. What the fixed texts and schemas say, and the classes,
    targets and weights' names of Φ, may be said. Of the vault's records, whatever 64 hexadecimal digits are no digest
    of something public: what P is drawn from, and what tells whether a guess of a private file is right.

    Raises:
        VerificationError: the release has no manifest, or a text is longer than any of a release.
        WeightsError: a safetensors file is damaged.
    """
    texts: dict[str, set[str]] = {}
    for file, text in public_texts(release):
        texts.setdefault(file, set()).add(_plain(text))
    if sources is None and project.vault.holds(project.vault.ids):
        sources = Sources.of(project.vault, project.private_table)
    names = {words: "a source file's name" for words in _said_names(project, sources, set().union(*texts.values()))}
    digits = _private_digits(project.vault)
    names |= _accounts(project) | _places(project)
    allowed = "\n".join(map(_plain, _fixed_texts(project)))
    names = {words: what for words, what in names.items() if not _says(allowed, words)}
    problems = []
    for file, said in texts.items():
        heard = (words for words in sorted(names) if any(_says(text, words) for text in said))
        here = list(islice(heard, MOST_COMPARED))
        longest = [words for words in here if not any(words in other for other in here if other != words)]
        found = [f"{words!r}, {names[words]}" for words in longest]
        if any(_IN_VAULT.search(text) for text in said):
            found.append("a path inside the vault")
        found += sorted({digits[run] for text in said for run in _HEX.findall(text) if run in digits})
        problems += [Problem("private text", file, f"says {words}") for words in found[:SHOWN]]
        if len(found) > SHOWN:
            problems.append(Problem("private text", file, f"says {len(found) - SHOWN} more names of the owner's"))
    return problems


def public_texts(release: Path) -> Iterator[tuple[str, str]]:
    """All texts of a release but format 1's in shards: (path of the file, text), the paths themselves too.

    Of files that the manifest does not list, and of links, pipes and devices, the path only. Raises as `private_words`.
    """
    with public_files(release) as (tree, files):
        yield from ((path, path) for path in tree.entries)
        for path in files:
            if path.endswith(".safetensors"):
                yield from ((path, text) for text in _texts_of_weights(release / path))
            elif not path.endswith(".h5"):  # a shard with other words than format 1's is refused by whoever opens it
                yield from ((path, text) for text in _strings(_read(tree, path)))


def _read(tree: Tree, path: str) -> str:
    try:
        with tree.file(path) as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise VerificationError(f"{path} cannot be read: {error.strerror}.") from error
    if len(content) > MAX_BYTES:
        raise VerificationError(f"{path}: expected a text of at most {MAX_BYTES >> 20} MiB, found a larger one.")
    return content.decode("utf-8", errors="replace")


def _strings(text: str) -> Iterator[str]:
    """Keys and values of a JSON text, without its numbers; a text that is not JSON as it is."""
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError):
        yield text
        return
    for key, part in _parts(tree):
        yield key
        if isinstance(part, str):
            yield part


def _parts(tree: Any) -> Iterator[tuple[str, Any]]:
    """Every part of a JSON tree, and the key that it stands under; that of a list for what is in it."""
    left = [("", tree)]
    while left:
        key, part = left.pop()
        yield key, part
        if isinstance(part, dict):
            left += part.items()
        elif isinstance(part, list):
            left += ((key, value) for value in part)


def _texts_of_weights(path: Path) -> Iterator[str]:
    header = read_tensor_file(path)
    yield from (tensor.name for tensor in header.tensors)
    for key, value in header.metadata.items():
        yield key
        yield from _strings(value)  # a record is JSON inside the header's JSON


def _plain(text: str) -> str:
    """Text as it is compared: composed characters, one case."""
    return text.lower() if text.isascii() else unicodedata.normalize("NFKC", text).casefold()


def _says(text: str, words: str) -> bool:
    """Whether a text has these words, not as a part of longer ones; both plain."""
    return words in text and re.search(rf"(?<![^\W_]){re.escape(words)}(?![^\W_])", text) is not None


def _said_names(project: Project, sources: Sources | None, texts: Iterable[str]) -> set[str]:
    """Names of source files that are said somewhere: stretches of words of a text that are one."""
    paths = chain(project.private_table.paths, sources.gone if sources else ())
    names = {words for path in paths for words in _names_of(path)}
    most_runs = max((len(_RUN.findall(words)) for words in names), default=0)
    return {stretch for text in texts for stretch in _stretches(text, most_runs) if stretch in names}


def _stretches(text: str, most_runs: int) -> Iterator[str]:
    """What lies between the beginning of a run of letters and digits and the end of one of the next few."""
    runs = [match.span() for match in _RUN.finditer(text)]
    for number, (start, _) in enumerate(runs):
        for last in range(number, min(number + most_runs, len(runs))):
            yield text[start : runs[last][1]]


def _names_of(source: str) -> Iterator[str]:
    path = PurePosixPath(source)
    for text in {source, path.name, path.stem}:
        words = _trimmed(_plain(text))
        # A stem such as 50000 is a count or a size in any text.
        is_number = words.isdecimal() and not words.startswith("0")
        if len(words) >= NAME_LENGTH and not is_number:
            yield words


def _trimmed(words: str) -> str:
    """From the first letter or digit to the last."""
    return re.sub(r"^[\W_]+|[\W_]+$", "", words)


def _accounts(project: Project) -> dict[str, str]:
    """User, host and home folder names, plain, and what each is."""
    names = dict.fromkeys((platform.node(), platform.node().split(".")[0]), "the name of this host")
    with contextlib.suppress(KeyError, OSError, RuntimeError):  # a container's user may have no name and no home
        names[getpass.getuser()] = "a user's name"
        names[Path.home().name] = "the name of a home folder"
    for uid in {os.getuid(), project.vault.root.stat().st_uid}:
        with contextlib.suppress(KeyError):
            user = pwd.getpwuid(uid)
            names |= {user.pw_name: "a user's name", user.pw_gecos.split(",")[0]: "a user's name"}
            names[Path(user.pw_dir).name] = "the name of a home folder"
    plain = {_trimmed(_plain(name)): what for name, what in names.items()}
    telling = {name for name in plain if len(name) >= ACCOUNT_LENGTH and not name.isdecimal()} - COMMON_ACCOUNTS
    return {name: what for name, what in plain.items() if name in telling}


def _private_digits(vault: Vault) -> dict[str, str]:
    """Every 64 hexadecimal digits of the vault's records that no release says, and where they stand."""
    records = [
        vault.ledger,
        vault.root / PRIVACY_LEDGER,
        vault.root / RETRACTED,
        vault.survey("private"),
        vault.survey("public"),
    ]
    folders = [vault.root / "functions", vault.features]
    members = [member for folder in folders for member in vault.members(folder) if member.suffix == ".json"]
    found: dict[str, str] = {}
    for member in [*filter(vault.holds, records), *members]:
        for key, part in _parts(vault.read_record(member, "package")):
            if isinstance(part, str) and re.fullmatch("[0-9a-f]{64}", part) and key not in PUBLIC_DIGESTS:
                found[part] = f"{key} of the private {member.relative_to(vault.root)}"
    return found


def _places(project: Project) -> dict[str, str]:
    """Paths and e-mail addresses, plain, and what each is."""
    config = project.config
    places: dict[str, str] = {}
    folders = {
        project.vault.root: "the path of the vault",
        config.folder: "the path of the project",
        config.locate(config.images.private.path): "the path of the private images",
    }
    with contextlib.suppress(RuntimeError):
        folders[Path.home()] = "the path of a home folder"
    for folder, what in folders.items():
        places |= {_plain(str(path)): what for path in (folder.absolute(), folder.resolve())}
    places |= {_plain(address): "an e-mail address of the git configuration" for address in _addresses(config.folder)}
    return {words: what for words, what in places.items() if len(words) > 1}


def _addresses(folder: Path) -> list[str]:
    asked = ["git", "config", "--get-regexp", r"^(user|author|committer)\.email$"]
    try:
        done = subprocess.run(asked, cwd=folder, capture_output=True, text=True, errors="replace", check=False)
    except OSError:  # no git
        return []
    return [address for line in done.stdout.splitlines() for address in line.split()[1:]]


@cache
def _schemas() -> list[str]:
    return [json.dumps(schema.model_json_schema()) for schema in (Manifest, ModelRecord, BankIndex, AttackReport)]


def _fixed_texts(project: Project) -> Iterator[str]:
    """What every release says, and what this owner chose to: classes, targets, their unit, names of weights."""
    yield fixed_card_text()
    yield from (MANIFEST, SUMS, "sha256sums", json.dumps(CONTEXT))
    yield from (pattern.replace("\\", "") for pattern in ROLES)
    yield from _schemas()
    yield from public_architectures()
    yield from (attack.title for attack in registered())
    spec = FeatureSpec(project.cut.record.feature_shape, project.cut.split.non_negative)
    ours = [function for function in FUNCTIONS.values() if function.__module__.startswith("dpf_release.")]
    yield from (function(spec).statement() for function in ours)
    parts = project.cut.split
    yield from [*parts.featurizer.state_dict(), *parts.classifier.state_dict()]
    yield from [*project.output_names, project.config.task.unit]
