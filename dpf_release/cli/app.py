"""The command line's application, and the options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from dpf_release.owner.project import Project


app = typer.Typer(
    help="Publish an image data set as poisoned feature banks, without publishing the images.\n\n"
    "Order of work: init, (train), featurize, fit-poison, poison, attack, package. Try it: dpf-release demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,  # locals hold private paths
)

IdentityOption = Annotated[
    Path | None,
    typer.Option(
        "--identity", envvar="DPF_RELEASE_IDENTITY", help="The file of the key that opens an encrypted vault."
    ),
]
FixPermissionsOption = Annotated[
    bool, typer.Option("--fix-permissions", help="Take away the rights of others to the vault.")
]
ConfigOption = Annotated[Path, typer.Option("--config", help="The owner's configuration.")]
NameOption = Annotated[str, typer.Option("--name", help="Which fitted function; several live side by side.")]
RestartOption = Annotated[bool, typer.Option("--restart", help="Begin anew; what was made before is lost.")]
DeviceOption = Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda, cuda:1 or mps.")]
ShardSizeOption = Annotated[
    str | None, typer.Option("--shard-size", help="Largest file of the bank, as '500 MB'; default: 1 GiB.")
]
EpochsOption = Annotated[int | None, typer.Option("--epochs", help="Passes over the images.")]

TrustCodeOption = Annotated[
    bool, typer.Option("--trust-code", help="Import and run a network or function of its owner's own.")
]

CONFIG = Path("dpf.toml")


def open_project(
    config: Path, identity: Path | None = None, fix_permissions: bool = False, device: str | None = None
) -> Project:
    """The project of a configuration."""
    from dpf_release.owner.project import Project

    return Project.open(config, {"compute.device": device}, identity, fix_permissions=fix_permissions)
