"""What the owner does to the vault as a whole, and the keys that sign releases."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dpf_release.cli.app import CONFIG, ConfigOption, FixPermissionsOption, IdentityOption, app

if TYPE_CHECKING:
    from dpf_release.owner.vault.vault import Vault

key_app = typer.Typer(
    help="Keys that sign releases.\n\nExample: dpf-release key new --out ~/owner-key", no_args_is_help=True
)
app.add_typer(key_app, name="key")

vault_app = typer.Typer(
    help="Seal the vault, open it, make it forget, look at it.\n\nExample: dpf-release vault seal --recipient age1...",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,  # locals hold private paths
)
app.add_typer(vault_app, name="vault")


def open_vault(config: Path, identity: Path | None = None, fix_permissions: bool = False) -> Vault:
    """The vault beside a configuration."""
    from dpf_release.owner.config import read_config
    from dpf_release.owner.vault.vault import Vault

    return Vault.open(read_config(config).folder / "vault", identity, fix_permissions=fix_permissions)


@vault_app.command("seal")
def vault_seal(
    recipient: Annotated[
        list[str] | None,
        typer.Option("--recipient", help="A public key, age1...; repeat it for more. Not needed a second time."),
    ] = None,
    forget: Annotated[
        list[str] | None,
        typer.Option("--forget", help="Remove, in the place of sealing: features, candidates or figures; repeatable."),
    ] = None,
    config: ConfigOption = CONFIG,
    fix_permissions: FixPermissionsOption = False,
) -> None:
    """Encrypt every member of the vault for whoever has the secret key of a recipient (age format).

    Example: dpf-release vault seal --recipient age1ql3z7hjy54pw3hyww5ayyfg7zqgvc7w3j2elw8zmrj2kg5sfn9aqmcac8p
    """
    from dpf_release.owner.vault import sealing

    vault = open_vault(config, fix_permissions=fix_permissions)
    state = sealing.seal(vault, recipient or (), forget or ())
    print(
        f"Sealed: {len(state.sealed)} members of {vault.root}. Without the identity file nobody opens them, nor do "
        f"you: keep two copies of it, none of them here. Files in the clear were removed.\n{sealing.DELETION}"
    )


@vault_app.command("open")
def vault_open(
    identity: IdentityOption = None, config: ConfigOption = CONFIG, fix_permissions: FixPermissionsOption = False
) -> None:
    """Decrypt every member of a sealed vault for good.

    Example: dpf-release vault open --identity ~/keys/shapes.txt
    """
    from dpf_release.owner.vault import sealing

    vault = open_vault(config, identity, fix_permissions)
    print(f"Opened: {len(sealing.unseal(vault).clear)} members of {vault.root} lie in the clear again.")


@vault_app.command("forget")
def vault_forget(
    config: ConfigOption = CONFIG, identity: IdentityOption = None, fix_permissions: FixPermissionsOption = False
) -> None:
    """Remove φ1(S), the candidates and the figures, once a release is made; they can be made again from S.

    Example: dpf-release vault forget
    """
    from dpf_release.core.sizes import readable_size
    from dpf_release.owner.vault import sealing

    forgotten = sealing.forget(open_vault(config, identity, fix_permissions))
    print(
        f"Removed {forgotten.files} files, {readable_size(forgotten.bytes)}: φ1(S), candidates, figures. `dpf-release "
        f"featurize` and `dpf-release poison` make the same rows again, while S stays as it is.\n{sealing.DELETION}"
    )


@vault_app.command("check")
def vault_check(config: ConfigOption = CONFIG, fix_permissions: FixPermissionsOption = False) -> None:
    """Say whether the vault is its owner's alone, and what of it is sealed.

    Example: dpf-release vault check --fix-permissions
    """
    from dpf_release.owner.vault import sealing

    vault = open_vault(config, fix_permissions=fix_permissions)
    state = sealing.check(vault)
    print(f"{vault.root}: no one but you has a right in it, and git tracks none of it.")
    if state.seals:
        print(f"Sealed for {', '.join(state.seals.recipients)}: {len(state.sealed)} members.")
    else:
        print(f"Not sealed: {len(state.clear)} members lie in the clear.")


@key_app.command("new")
def key_new(out: Annotated[Path, typer.Option("--out", help="The private key's file; a new one.")]) -> None:
    """Make a key pair to sign releases with: the private key, and OUT.pub.pem to give to your users.

    Example: dpf-release key new --out ~/owner-key
    """
    from dpf_release.release.signing import new_key

    public, of_key = new_key(out)
    print(f"Wrote {out} (private: keep it, and keep it out of every release) and {public} (public).")
    print(f"Fingerprint of the public key: {of_key}")
