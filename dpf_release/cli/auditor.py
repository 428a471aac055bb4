"""The auditor's commands: verify, audit, inspect."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from dpf_release.cli.app import IdentityOption, TrustCodeOption, app
from dpf_release.cli.printing import print_table
from dpf_release.errors import VerificationError


@app.command()
def verify(
    release: Annotated[Path, typer.Argument(help="A release folder.")],
    public_key: Annotated[
        Path | None,
        typer.Option("--public-key", help="The owner's, from where you trust it: the release must be signed with it."),
    ] = None,
    deep: Annotated[
        bool, typer.Option("--deep", help="Decode every row too, in a process with little memory and time.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Check a release against its manifest: missing, changed and unexpected files, links, signature.

    Example: dpf-release verify release --public-key owner-key.pub.pem
    """
    from dpf_release.release.contents import verify_deep
    from dpf_release.release.signing import fingerprint, read_public_key
    from dpf_release.release.verify import verify as run

    problems = (verify_deep if deep else run)(release, public_key)
    signer = None if public_key is None or problems else fingerprint(read_public_key(public_key, release))
    if as_json:
        found = [asdict(problem) for problem in problems]
        print(json.dumps({"release": str(release), "signer": signer, "problems": found}, indent=2))
        raise typer.Exit(VerificationError.exit_code if problems else 0)
    if problems:
        lines = [str(problem) for problem in problems]
        raise VerificationError(f"{release} fails verification:\n  " + "\n  ".join(lines), lines)
    who = f"signed by the key {signer}" if signer else "integrity only, signer unknown; see --public-key"
    print(f"{release}: every file is as its manifest says ({who})")
    if deep:
        print("Every file is what its role asks for, and every row can be read.")


@app.command()
def audit(
    release: Annotated[Path, typer.Argument(help="A release folder; a copy that was downloaded will do.")],
    vault: Annotated[
        Path | None, typer.Option("--vault", help="The vault that made it; dpf.toml lies beside it.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="In the place of --vault: the owner's dpf.toml.")
    ] = None,
    public_key: Annotated[
        Path | None, typer.Option("--public-key", help="Of the signer, from where you trust it.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON (docs/audit.md) in the place of tables.")] = False,
    html: Annotated[Path | None, typer.Option("--html", help="Also write one page that works offline.")] = None,
    identity: IdentityOption = None,
    trust_code: TrustCodeOption = False,
) -> None:
    """Say of every file whether it is public, what it holds and which check passed; with the vault, what leaked.

    Exits with 3 on any finding. What is made with --vault is private.

    Example: dpf-release audit release --vault vault --html audit.html
    """
    if vault and config:
        raise typer.BadParameter("--vault and --config say the same; give one of them")
    from dpf_release.publish.audit.audit import audit as run
    from dpf_release.publish.audit.audit import project_of
    from dpf_release.publish.audit.page import write_page
    from dpf_release.publish.audit.terminal import print_audit

    place = config.parent / "vault" if config else vault
    found = run(release, project_of(place, identity, trust_code=trust_code) if place else None, public_key)
    if html:
        write_page(found, html, release)
    if as_json:
        print(found.as_json())
    else:
        print_audit(found)
    if found.findings:
        raise VerificationError(f"{release}: {found.headline}. {found.verdict}")


@app.command()
def inspect(
    path: Annotated[str, typer.Argument(help="A release, vault, bank or shard, dpf.toml, or an architecture's name.")],
    size: Annotated[int, typer.Option("--size", help="For an architecture: side of its input in pixels.")] = 224,
    width: Annotated[int | None, typer.Option("--width", help="For resnet20_cifar and resnet56_cifar.")] = None,
    trust_code: TrustCodeOption = False,
) -> None:
    """Say what a bank, release or vault holds, or where a network can be cut.

    Example: dpf-release inspect resnet50
    """
    from dpf_release.publish.inspect import inspect as run

    for table in run(path, size, width, trust_code=trust_code):
        print_table(*table)
