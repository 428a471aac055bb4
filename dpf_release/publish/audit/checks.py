"""The checks of an audit: what each proves, what it cannot see, and what does it.

One more check is one more entry of `CHECKS`. They run in that order; no check opens a file that failed one before it.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import stat
from collections.abc import Iterable
from pathlib import Path

from dpf_release.bank.format import INDEX, read_index
from dpf_release.core.files import sha256_of
from dpf_release.core.privacy import composed, epsilon_of
from dpf_release.errors import VaultError, VerificationError
from dpf_release.owner.fitted import FittedFunction, load_function
from dpf_release.owner.privacy import fits_of
from dpf_release.owner.vault.contents import OPENED
from dpf_release.owner.vault.ledger import releases
from dpf_release.owner.vault.permissions import problem_of, refuse_tracked
from dpf_release.publish.audit.engine import Check, Finding, NotRunError, Subject
from dpf_release.publish.leaks.drawn import source_order, telling_ids
from dpf_release.publish.leaks.findings import Sources, public_banks
from dpf_release.publish.leaks.near_rows import SAME_ROW_COSINE
from dpf_release.publish.leaks.private_facts import drawn_ids, private_rows
from dpf_release.publish.leaks.tensors import private_tensors
from dpf_release.publish.leaks.text import private_words
from dpf_release.publish.swap import nested_with
from dpf_release.release.contents import check_structure
from dpf_release.release.manifest import CLASSIFIER, FEATURIZER, MANIFEST, MODEL, PROCEDURE
from dpf_release.release.model_record import read_model_record
from dpf_release.release.release import Release
from dpf_release.release.tree import Tree
from dpf_release.release.verify import Problem, verify

BANK = ("bank-index", "shard")
WEIGHTS = ("featurizer", "classifier", "procedure")
SAME_EPSILON = 1e-4  # as far as two ways to reckon it differ


def _structure(subject: Subject) -> list[Problem]:
    subject.refuse_gaps(subject.files)
    return check_structure(subject.release, deep=True)


def _agreement(subject: Subject) -> Iterable[Finding]:
    subject.refuse_gaps(subject.files)
    try:
        Release.open(subject.release, verify="none")
    except VerificationError as error:
        for problem in error.problems or [str(error)]:
            yield Finding("contradiction", MANIFEST, problem)


def _poisoned(subject: Subject) -> Iterable[Finding]:
    if not subject.bank.poisoned:
        yield Finding("not poisoned", "features", "the bank says of itself that its rows are φ1(S), as they are")


def _signature(subject: Subject) -> list[Problem]:
    if subject.public_key is None:
        raise NotRunError("no public key was given (--public-key): who published the files is unknown")
    found = verify(subject.release, subject.public_key, digest=None)
    return [problem for problem in found if problem.kind == "bad signature"]


def _ledger(subject: Subject) -> Iterable[Finding]:
    vault = subject.opened.vault
    subject.refuse_gaps([])
    digest, entries = sha256_of(subject.release / MANIFEST), releases(vault)
    if digest not in [entry["manifest_sha256"] for entry in entries]:
        known = ", ".join(f"{entry['name']} {entry['version']}" for entry in entries) or "none"
        detail = f"the vault's ledger has no release with this manifest; it has: {known}"
        yield Finding("unknown release", MANIFEST, detail)


def _bound(subject: Subject) -> Iterable[Finding]:
    subject.refuse_gaps([])
    told = subject.manifest.privacy if subject.manifest else None
    if told is None:
        return
    of_one = epsilon_of(told.mu, told.delta)
    if not math.isclose(of_one, told.epsilon, rel_tol=SAME_EPSILON):
        yield Finding("bound", MANIFEST, f"says epsilon = {told.epsilon:g}; its noise gives {of_one:.4g}")
    alone = math.isclose(told.epsilon_of_all, told.epsilon, rel_tol=SAME_EPSILON)
    if told.epsilon_of_all < told.epsilon * (1 - SAME_EPSILON) or (told.fits == 1 and not alone):
        detail = f"says epsilon = {told.epsilon_of_all:g} of {told.fits} fits, and {told.epsilon:g} of one"
        yield Finding("bound", MANIFEST, detail)


def _spending(subject: Subject) -> Iterable[Finding]:
    vault = subject.opened.vault
    subject.refuse_gaps([])
    told, digest = subject.manifest.privacy if subject.manifest else None, sha256_of(subject.release / MANIFEST)
    made = releases(vault)
    mine = [number for number, entry in enumerate(made) if entry["manifest_sha256"] == digest]
    if not mine:
        raise NotRunError("the vault's ledger has no release with this manifest")
    known = {fit.id: fit.mechanism for fit in fits_of(vault)}
    booked = known.get(made[mine[0]].get("fit", ""))
    if told is None or booked is None:
        if told is not booked:
            detail = f"the privacy ledger lists {'a' if booked else 'no'} fit for it, the manifest says otherwise"
            yield Finding("spending", MANIFEST, detail)
        return
    of_fit = {"epsilon", "delta", "unit", "noise", "sensitivity", "shares", "clip", "library"}
    yield from (
        Finding("spending", MANIFEST, f"says {key} = {getattr(told, key)}, the ledger {getattr(booked, key)}")
        for key in sorted(of_fit)
        if getattr(told, key) != getattr(booked, key)
    )
    until = {entry["fit"] for entry in made[: mine[0] + 1] if entry.get("fit")}
    least = epsilon_of(composed(known[fit].mu for fit in until), told.delta)
    if told.fits < len(until) or told.epsilon_of_all < least * (1 - SAME_EPSILON):
        detail = f"says epsilon = {told.epsilon_of_all:g} of {told.fits} fits; {len(until)} were published: {least:.4g}"
        yield Finding("spending", MANIFEST, detail)


def _phi_2(subject: Subject) -> str:
    """The digest of φ2 as the vault has it: Φ's, or what the ledger noted of one that was trained on the bank."""
    project, digest = subject.opened, sha256_of(subject.release / MANIFEST)
    if project.config.network.classifier == "from-bank":
        for entry in releases(project.vault):
            if entry["manifest_sha256"] == digest:
                return str(entry.get("classifier_sha256"))
    return hashlib.sha256(project.cut.classifier_file).hexdigest()


def _network(subject: Subject) -> list[Finding]:
    cut = subject.opened.cut
    expected = {FEATURIZER: cut.featurizer_sha256, CLASSIFIER: _phi_2(subject)}
    if PROCEDURE in subject.files and (function := _function(subject)) and (procedure := function.chain.procedure):
        expected[PROCEDURE] = hashlib.sha256(procedure.file()).hexdigest()
    detail = "not the bytes that the vault's network or function gives"
    found = [
        Finding("foreign weights", path, detail)
        for path, digest in expected.items()
        if subject.is_sound(path) and subject.files[path].sha256 != digest
    ]
    if subject.is_sound(MODEL) and read_model_record(subject.release / MODEL) != cut.public_record:
        found.append(Finding("foreign record", MODEL, "does not say what the vault's network is"))
    if not found:
        subject.refuse_gaps([*expected, MODEL])
    return found


def _rows(subject: Subject) -> list[Problem]:
    vault, index = subject.opened.vault, subject.bank
    if not vault.holds(vault.features / INDEX):
        raise NotRunError("the vault has no φ1(S) to compare with: it was never written, or was forgotten")
    theirs = read_index(vault.opened(vault.features, INDEX))
    if (theirs.featurizer_sha256, theirs.feature_shape) != (index.featurizer_sha256, index.feature_shape):
        raise NotRunError("the vault's φ1(S) is of another featurizer: comparing with it would say nothing")
    return private_rows(public_banks(subject.release), subject.owners, _function(subject))


def _function(subject: Subject) -> FittedFunction | None:
    """The fitted function that made the release; None where the vault no longer has it."""
    digest = sha256_of(subject.release / MANIFEST)
    for entry in releases(subject.owners.vault):
        if entry["manifest_sha256"] == digest:
            with contextlib.suppress(VaultError):
                function = load_function(subject.owners, entry["function"])
                if function.digest == entry["function_digest"]:
                    return function
    return None


def _ids(subject: Subject) -> list[Problem]:
    sources, digest = _sources(subject), sha256_of(subject.release / MANIFEST)
    drawn = drawn_ids(_function(subject))
    if drawn is None and any(
        entry["manifest_sha256"] == digest and entry.get("drawn") for entry in releases(subject.owners.vault)
    ):
        drawn = {}  # the function is no longer in the vault
    return telling_ids(public_banks(subject.release), sources, drawn)


def _order(subject: Subject) -> list[Problem]:
    sources = _sources(subject)
    return source_order(public_banks(subject.release), sources)


def _tensors(subject: Subject) -> list[Problem]:
    vault = subject.comparable.vault
    return private_tensors(subject.release, vault, public_banks(subject.release))


def _sources(subject: Subject) -> Sources:
    project = subject.comparable
    return Sources.of(project.vault, project.private_table)


def _place(subject: Subject) -> list[Finding]:
    owners = subject.owners
    return [Finding("place", ".", why) for why in nested_with(subject.release, owners.config, owners.vault.root)]


def vault_entries(root: Path) -> tuple[dict[str, os.stat_result], dict[str, str]]:
    """`entries` of a vault's `Tree`, but for the copies that this audit reads, and what of it is `unseen`."""
    with Tree.open(root) as tree:
        return {path: found for path, found in tree.entries.items() if path.split("/")[0] != OPENED}, tree.unseen


def _vault(subject: Subject) -> Iterable[Finding]:
    root = subject.owners.vault.root
    entries, unseen = vault_entries(root)
    for name, found in {".": root.lstat(), **entries}.items():
        kind, detail = problem_of(found)
        if kind:
            yield Finding(kind, name, detail)
    for name, why in unseen.items():
        yield Finding("not looked at", name, why)
    ignore = entries.get(".gitignore")
    plain = ignore is not None and stat.S_ISREG(ignore.st_mode) and ignore.st_size == len(b"*\n")
    if not plain or (root / ".gitignore").read_bytes() != b"*\n":
        yield Finding("git", ".gitignore", "expected a line `*` and no other, so that git takes nothing from the vault")
    try:
        refuse_tracked(root)
    except VaultError as error:
        yield Finding("git", ".", str(error))


CHECKS: tuple[Check, ...] = (
    Check(
        "files",
        "Each file is, byte for byte, the one that manifest.json lists, and the folder holds nothing else.",
        "Who wrote the manifest: who changes a file can change the list too.",
        "Fetch the release again from where you trust it. Its owner: take out what does not belong, find out how it "
        "came there, and run `dpf-release package` again.",
        lambda subject: verify(subject.release),
        ("manifest", "checksums", "signature", "card", "croissant", "model-record", "attack-report", *WEIGHTS, *BANK),
    ),
    Check(
        "signature",
        "The manifest was signed with the key whose public half was given.",
        "Whether that key is its owner's: the key that lies in a release proves nothing about who made it.",
        "Take neither release nor key from there. Ask the owner for both.",
        _signature,
        ("manifest",),
    ),
    Check(
        "structure",
        "Records fit their schemas, weights are plain safetensors, and each shard is of bank format 1, byte for byte: "
        "no links, no data outside the file, no bytes that belong to nothing; every row can be read and is finite.",
        "Meaning: a row of the right form may hold anything.",
        "Open none of these files with other programs. Ask the publisher for a whole release.",
        _structure,
        ("card", "croissant", "model-record", "attack-report", *WEIGHTS, *BANK),
    ),
    Check(
        "agreement",
        "Manifest, model record, weights and bank speak of the same featurizer, shapes, classes and shards.",
        "Whether what they agree on is true.",
        "Do not use the release: its parts are of different origin. Its owner: run `dpf-release package` again.",
        _agreement,
        ("manifest", "model-record", "featurizer", *BANK),
    ),
    Check(
        "poisoned",
        "The index of the bank says that its rows are poisoned, and `structure` found that its shards say the same.",
        "A flag that lies. With the vault, `rows` compares the rows themselves.",
        "Take the release down: a reconstructor shows the pictures in unpoisoned features.",
        _poisoned,
        BANK,
    ),
    Check(
        "bound",
        "Where the manifest names a privacy bound: its noise gives the ε that it says.",
        "Whether that noise was added, to these statistics; whether the networks never saw the images.",
        "Trust no number of the bound. Its owner: run `dpf-release package` again, and report it where that fails.",
        _bound,
        ("manifest",),
    ),
    Check(
        "ledger",
        "The vault's ledger lists exactly this manifest: the release was packaged from this vault.",
        "Releases made from a copy of the vault.",
        "Give the vault that made this release. If it is this one, somebody else packaged what you hold.",
        _ledger,
        ("manifest",),
    ),
    Check(
        "spending",
        "The privacy ledger lists the fit that the release is made of, with the noise that the manifest says, and no "
        "more was published before it than the manifest counts.",
        "Releases of the same images from another vault, or from a copy of this one.",
        "Take the release down. Bring back the vault's privacy.json as it was, and package again.",
        _spending,
        ("manifest",),
    ),
    Check(
        "network",
        "φ1, φ2 and their record are, byte for byte, what the vault's network gives at its hook point; the weights "
        "files hold nothing more.",
        "What Φ itself remembers of the images that it was trained on.",
        "Take the release down, and find out where these weights come from before you package again.",
        _network,
        ("model-record", *WEIGHTS),
    ),
    Check(
        "rows",
        "No public row is as good as equal to a row of φ1(S), up to a scale (mean-centred |cosine| above "
        f"{SAME_ROW_COSINE}), nor is a bank one of such rows times a number plus a row.",
        "What a trained attacker gets out of a row. Other functions of rows, as a permutation of channels, and single "
        "rows that are shifted are not looked for.",
        "Take the release down. What was downloaded cannot be called back: tell the people in the pictures.",
        _rows,
        BANK,
    ),
    Check(
        "words",
        "No public text says the name of a source file, of the owner, of the machine or of a folder.",
        "Words of fewer than six letters, other languages' forms of a name, what the pictures show.",
        "Take the release down, change [release] in dpf.toml, and package again.",
        lambda subject: private_words(subject.release, subject.comparable),
        ("card", "croissant", "model-record", "attack-report", *WEIGHTS, *BANK),
    ),
    Check(
        "tensors",
        "No public tensor or row equals one of P, ψ or another private member of the vault.",
        "A tensor that was changed, if only by its last bit in float16.",
        "Take the release down: with P, or enough of it, the poisoning is undone.",
        _tensors,
        (*WEIGHTS, *BANK),
    ),
    Check(
        "ids",
        "The ids are those that the vault's plan drew, in its order; they look random and are no digest of an image.",
        "A derivation that it does not try.",
        "Take the release down: who guesses an image finds its row.",
        _ids,
        ("shard",),
    ),
    Check(
        "order",
        "The order of the rows does not go with the order of the source, as a whole or within a class, nor by steady "
        "steps through it.",
        "Orders by something else than the image table; other orders that can be reckoned.",
        "Take the release down, and write the features anew with `dpf-release featurize --restart`.",
        _order,
        ("shard",),
    ),
    Check(
        "place",
        "Neither the vault nor the images S and Q lie in the release folder, nor the release in the vault.",
        "Copies elsewhere: backups, synchronised folders, mail.",
        "Move them apart before anything is copied or uploaded.",
        _place,
    ),
    Check(
        "vault",
        "Only the owner of the vault, who runs this, can read its files (0600, folders 0700), it has no links, and git "
        "ignores it and tracks none of it.",
        "Access lists, backups, and whoever administers the machine.",
        "Run `chmod -R go-rwx` on the vault. Who could read it so far may have what undoes the release.",
        _vault,
        side="private",
    ),
)
