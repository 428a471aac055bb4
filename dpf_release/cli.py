"""The command line: each command parses, calls one public function, prints what it returned."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dpf_release.errors import DPFReleaseError, VerificationError
from dpf_release.storage import return_large_blocks

if TYPE_CHECKING:
    from dpf_release.pictures import BadImage
    from dpf_release.pipeline import Project
    from dpf_release.vault import Vault

app = typer.Typer(
    help="Publish an image data set as poisoned feature banks, without publishing the images.\n\n"
    "Order of work: init, (train), featurize, fit-poison, poison, attack, package. Try it: dpf-release demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,  # locals hold private paths
)
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

IdentityOption = Annotated[
    Path | None,
    typer.Option("--identity", envvar="DPF_RELEASE_IDENTITY", help="The age identity file that opens a sealed vault."),
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


def main() -> None:
    """Runs the command; a user's mistake ends with one paragraph and an exit code, a bug with its traceback."""
    rank = int(os.environ.get("RANK", "0"))
    return_large_blocks()
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere if rank else sys.stdout):  # noqa: PTH123
            app()
    except DPFReleaseError as error:
        print(f"dpf-release{f' (rank {rank})' if rank else ''}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def _project(config: Path, identity: Path | None = None, fix_permissions: bool = False, **overrides: Any) -> Project:
    """A project with options over its configuration; `poison__epochs=3` is the key `poison.epochs`."""
    from dpf_release.pipeline import Project

    dotted = {key.replace("__", "."): value for key, value in overrides.items()}
    return Project.open(config, dotted, identity, fix_permissions=fix_permissions)


def _vault(config: Path, identity: Path | None = None, fix_permissions: bool = False) -> Vault:
    from dpf_release.config import read_config
    from dpf_release.vault import Vault

    return Vault.open(read_config(config).folder / "vault", identity, fix_permissions=fix_permissions)


def _print_unreadable(images: Sequence[BadImage]) -> None:
    for bad in images:
        print(f"left out, unreadable: {bad.name}: {bad.reason}")


def _print_table(title: str, header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", show_edge=False)
    for number, column in enumerate(header):
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    Console().print(table)


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="The project's folder; made where missing.")],
    from_release: Annotated[
        Path | None,
        typer.Option("--from-release", help="Share the φ1 and φ2 of this release, as a second owner."),
    ] = None,
) -> None:
    """Write a commented dpf.toml and an empty vault.

    Example: dpf-release init my-release
    """
    from dpf_release.pipeline import init as run

    vault = run(folder, from_release)
    print(
        f"Wrote {folder / 'dpf.toml'} and {vault.root}. Next: edit dpf.toml, then `dpf-release featurize` in {folder}"
    )


@app.command()
def train(
    config: ConfigOption = CONFIG,
    epochs: EpochsOption = None,
    device: DeviceOption = None,
    restart: RestartOption = False,
    identity: IdentityOption = None,
    fix_permissions: FixPermissionsOption = False,
) -> None:
    """Train the network Φ on S, where there are no weights yet.

    Example: dpf-release train --epochs 30
    """
    from dpf_release.pipeline import train as run

    project = _project(config, identity, fix_permissions, train__epochs=epochs, compute__device=device)
    scores = run(project, restart)
    _print_unreadable(project.private_images.bad)
    unit = project.config.task.unit
    for split, score in scores.items():
        print(f"{split}: " + (f"MAE {score:.4g} {unit}" if project.config.task.targets else f"top-1 {score:.2%}"))


@app.command()
def featurize(
    config: ConfigOption = CONFIG,
    restart: RestartOption = False,
    device: DeviceOption = None,
    shard_size: ShardSizeOption = None,
    release: Annotated[Path | None, typer.Option("--release", help="Downstream: use the φ1 of this release.")] = None,
    images: Annotated[Path | None, typer.Option("--images", help="Downstream: your own images T.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Downstream: folder for the bank φ1(T).")] = None,
    max_bad: Annotated[float, typer.Option("--max-bad", help="Downstream: share of T that may be unreadable.")] = 0.001,
    identity: IdentityOption = None,
    fix_permissions: FixPermissionsOption = False,
) -> None:
    """Split Φ and write the private bank φ1(S) into the vault.

    Example: dpf-release featurize --shard-size "500 MB"

    On several processes, GPUs or machines with a shared folder: torchrun --nproc-per-node 2 -m dpf_release featurize

    Downstream, with a release and images of your own: dpf-release featurize --release R --images T --out B
    """
    from dpf_release import pipeline

    if release or images or out:
        if not (release and images and out):
            raise typer.BadParameter("--release, --images and --out go together")
        if restart:
            raise typer.BadParameter(
                "--restart is the owner's; to begin a bank of your own anew, remove --out's folder"
            )
        from dpf_release import Release

        index, unreadable = pipeline.featurize_new(
            Release.open(release),
            images,
            out,
            shard_size=shard_size or "1 GiB",
            max_bad=max_bad,
            device=device or "auto",
        )
        where = out
    else:
        project = _project(config, identity, fix_permissions, compute__device=device, bank__shard_size=shard_size)
        index, where = pipeline.featurize(project, restart), project.vault.features
        unreadable = list(project.private_images.bad)
    _print_unreadable(unreadable)
    counts = {split: sum(shard.rows for shard in shards) for split, shards in index.splits.items()}
    print(f"Wrote {where}: {counts}, {index.row_bytes} bytes a row")


@app.command("fit-poison")
def fit_poison(
    config: ConfigOption = CONFIG,
    name: NameOption = "default",
    function: Annotated[
        str | None,
        typer.Option("--function", help="dpf, recombine:k=20, gaussian-filter+dpf, ... (see dpf.toml)"),
    ] = None,
    objective: Annotated[str | None, typer.Option("--objective", help="equivalence or paper.")] = None,
    lambda_: Annotated[float | None, typer.Option("--lambda", help="Weight of the byproduct attackers' term.")] = None,
    epochs: EpochsOption = None,
    device: DeviceOption = None,
    restart: RestartOption = False,
    identity: IdentityOption = None,
    fix_permissions: FixPermissionsOption = False,
) -> None:
    """Train the straw man ψ on Q where missing, then the poisoning function P on S.

    Example: dpf-release fit-poison --name paper --objective paper
    """
    from dpf_release.pipeline import fit_poison as run

    poison = {
        "poison.function": function,
        "poison.objective": objective,
        "poison.lambda": lambda_,
        "poison.epochs": epochs,
    }
    overrides = {key.replace(".", "__"): value for key, value in poison.items()}
    project = _project(config, identity, fix_permissions, compute__device=device, **overrides)
    last = run(project, name, restart)
    if project.config.poison.straw_men:
        _print_unreadable(project.public_images.bad)
    facts = ", ".join(f"{key} {value:.4g}" for key, value in last.items()) or "a stationary function: nothing to train"
    print(f"Fitted {name}: {facts}. Next: dpf-release poison --name {name}")


@app.command()
def poison(
    config: ConfigOption = CONFIG,
    name: NameOption = "default",
    device: DeviceOption = None,
    shard_size: ShardSizeOption = None,
    restart: RestartOption = False,
    identity: IdentityOption = None,
    fix_permissions: FixPermissionsOption = False,
) -> None:
    """Write the candidate P(φ1(S)) into the vault, and measure it.

    Example: dpf-release poison --name paper

    On several processes: torchrun --nproc-per-node 2 -m dpf_release poison --name paper
    """
    from dpf_release import pipeline

    project = _project(config, identity, fix_permissions, compute__device=device, bank__shard_size=shard_size)
    pipeline.write_candidate(project, name, restart)
    print_measurements(pipeline.measure(project, name))
    pictures = project.vault.reports(name) / "reconstructions.png"
    if pictures.is_file():
        print(f"Pictures: {pictures} (private)")


def print_measurements(report: Mapping[str, Any]) -> None:
    """The table of `measure`: clean and poisoned, split by split."""
    for split in [name for name in ("val", "test") if name in report]:
        part = report[split]
        if "not_measured" in part:
            print(f"{split}: {part['not_measured']}")
            continue
        rows = []
        for task_metric in ("top1", "top5", "mae"):
            if f"{task_metric}_clean" in part["task"]:
                rows.append(_measured_row(f"φ2 {task_metric}", part["task"], task_metric))
        for straw_man, values in part["reconstruction"].items():
            rows += [
                _measured_row(f"{straw_man} {metric}", values, metric) for metric in ("l1", "psnr", "ssim", "abs_ssim")
            ]
        for column, values in part["attributes"].items():
            if "not_measured" in values:
                rows.append((f"{column} top1", "", "", values["not_measured"]))
            else:
                rows.append(_measured_row(f"{column} top1", values, "top1"))
        objective = f", objective {report['objective']}" if report["objective"] else ""
        title = f"{split}, {part['rows']} rows, {report['function']}{objective}"
        _print_table(title, ("", "clean", "poisoned", "clean - poisoned, 95 %"), rows)


def _measured_row(label: str, values: Mapping[str, Any], metric: str) -> tuple[str, ...]:
    interval = values.get(f"{metric}_difference_95")
    shown = f"{values[f'{metric}_difference']:.4f} [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else ""
    return label, f"{values[f'{metric}_clean']:.4f}", f"{values[f'{metric}_poisoned']:.4f}", shown


@app.command()
def attack(
    config: ConfigOption = CONFIG,
    name: NameOption = "default",
    profile: Annotated[str, typer.Option("--profile", help="quick, standard or full; default: gate.profile.")] = "",
    only: Annotated[
        str, typer.Option("--only", help="Codes of attacks and utilities, as A1,A5,U3; default: all of the profile.")
    ] = "",
    budget: Annotated[
        float | None,
        typer.Option("--budget", min=0.01, help="Minutes of training; with less than it takes no claim passes."),
    ] = None,
    images: Annotated[
        int | None,
        typer.Option("--images", min=1, help="Pictures a training is shown; or say --budget, which reckons them."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of all that is drawn.")] = 0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON (docs/attacks.md) in the place of tables.")
    ] = False,
    public: Annotated[
        Path | None,
        typer.Option("--public", help="Also write a page that anyone may see: its numbers, and pictures of Q only."),
    ] = None,
    device: DeviceOption = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Attack anew; networks that attackers trained, and what failed, are kept.")
    ] = False,
    identity: IdentityOption = None,
    fix_permissions: FixPermissionsOption = False,
) -> None:
    """Run the attack battery on the candidate, and write the report into the vault.

    A run that was cut off goes on. It says beforehand how long it takes.

    Example: dpf-release attack --name default --profile quick
    """
    from dpf_release.battery import attack as run
    from dpf_release.battery import print_attacks, publish_page

    project = _project(config, identity, fix_permissions, compute__device=device)
    if budget is not None and images is not None:
        raise typer.BadParameter("expected one of --budget and --images, found both: each says how much is trained")
    codes = [code.strip() for code in only.split(",") if code.strip()]
    report = run(project, name, profile, only=codes, budget_minutes=budget, images=images, seed=seed, restart=restart)
    if public:
        publish_page(project, name, report, public)
    if as_json:
        print(report.as_json())
    else:
        print_attacks(report)
        print(f"Report: {project.vault.reports(name) / 'attack.html'} (private)")


@app.command()
def compare(
    names: Annotated[list[str] | None, typer.Argument(help="Fitted functions; default: all that are poisoned.")] = None,
    config: ConfigOption = CONFIG,
    profile: Annotated[str, typer.Option("--profile", help="quick, standard or full.")] = "quick",
    budget: Annotated[
        float | None, typer.Option("--budget", min=0.01, help="Minutes of training for the attacks on each function.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of all that is drawn.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON in the place of a table.")] = False,
    device: DeviceOption = None,
    identity: IdentityOption = None,
    fix_permissions: FixPermissionsOption = False,
) -> None:
    """Draw privacy against utility for several fitted functions, from the candidate of each.

    Runs `attack` where it was not run yet with this profile; a run that was cut off goes on.

    Example: dpf-release compare equivalence paper --profile quick
    """
    from dpf_release.battery import compare as run
    from dpf_release.battery import print_frontier

    project = _project(config, identity, fix_permissions, compute__device=device)
    frontier = run(project, names or (), profile, budget_minutes=budget, seed=seed)
    if as_json:
        print(json.dumps(frontier.model_dump(mode="json"), indent=2, sort_keys=True))
    else:
        print_frontier(frontier)
        print(f"Frontier: {project.vault.root / 'reports'}/frontier.json, .svg, .png (private)")


@app.command()
def package(
    config: ConfigOption = CONFIG,
    name: NameOption = "default",
    out: Annotated[Path | None, typer.Option("--out", help="The release folder; default: release.")] = None,
    sign: Annotated[
        Path | None, typer.Option("--sign", help="Sign with this private key, made by `dpf-release key new`.")
    ] = None,
    second_function: Annotated[
        str,
        typer.Option(
            "--second-function",
            metavar="REASON",
            help="Why these images are published again, under another function; public, on the card.",
        ),
    ] = "",
    accept_risk: Annotated[
        str,
        typer.Option(
            "--accept-risk",
            metavar="REASON",
            help="Why to publish without the claims that attacks do not bear out; public, on the card.",
        ),
    ] = "",
    identity: IdentityOption = None,
    fix_permissions: FixPermissionsOption = False,
) -> None:
    """Check the candidate and publish it: the only command that writes public files.

    Example: dpf-release package --name default --out release --sign ~/owner-key
    """
    from dpf_release.package import package as run

    project = _project(config, identity, fix_permissions)
    manifest = run(project, name, out, sign, second_function, accept_risk)
    print(f"Published {manifest.name} {manifest.version} in {out or project.config.folder / 'release'}:")
    for file in manifest.files:
        print(f"  {file.path}  {file.bytes} bytes  {file.role}")
    if manifest.version != (said := project.config.release.version):
        print(f"As {manifest.version}, and not as {said}, which was published with rows that are retracted since.")
    made, not_made = (", ".join(claims) or "none" for claims in (manifest.claims.made, manifest.claims.not_made))
    print(f"Claims made: {made}. Claims not made: {not_made}.")
    if not any(file.role == "attack-report" for file in manifest.files):
        print("No attack battery was run on it.")


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
    from dpf_release import sealing

    vault = _vault(config, fix_permissions=fix_permissions)
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
    from dpf_release import sealing

    vault = _vault(config, identity, fix_permissions)
    print(f"Opened: {len(sealing.unseal(vault).clear)} members of {vault.root} lie in the clear again.")


@vault_app.command("forget")
def vault_forget(
    config: ConfigOption = CONFIG,
    identity: IdentityOption = None,
    fix_permissions: FixPermissionsOption = False,
) -> None:
    """Remove φ1(S), the candidates and the figures, once a release is made; they can be made again from S.

    Example: dpf-release vault forget
    """
    from dpf_release import sealing
    from dpf_release.storage import readable_size

    forgotten = sealing.forget(_vault(config, identity, fix_permissions))
    print(
        f"Removed {forgotten.files} files, {readable_size(forgotten.bytes)}: φ1(S), candidates, figures. `dpf-release "
        f"featurize` and `dpf-release poison` make the same rows again, while S stays as it is.\n{sealing.DELETION}"
    )


@vault_app.command("check")
def vault_check(config: ConfigOption = CONFIG, fix_permissions: FixPermissionsOption = False) -> None:
    """Say whether the vault is its owner's alone, and what of it is sealed.

    Example: dpf-release vault check --fix-permissions
    """
    from dpf_release import sealing

    vault = _vault(config, fix_permissions=fix_permissions)
    state = sealing.check(vault)
    print(f"{vault.root}: no one but you has a right in it, and git tracks none of it.")
    if state.seals:
        print(f"Sealed for {', '.join(state.seals.recipients)}: {len(state.sealed)} members.")
    else:
        print(f"Not sealed: {len(state.clear)} members lie in the clear.")


@app.command()
def retract(
    config: ConfigOption = CONFIG,
    row_id: Annotated[list[str] | None, typer.Option("--id", help="A row, as the bank and ids.csv name it.")] = None,
    source: Annotated[
        list[str] | None, typer.Option("--source", help="An image, as ids.csv names it, or its file name.")
    ] = None,
    source_file: Annotated[
        Path | None, typer.Option("--source-file", help="A text file with the name of an image a line.")
    ] = None,
    device: DeviceOption = None,
    identity: IdentityOption = None,
    fix_permissions: FixPermissionsOption = False,
) -> None:
    """Take images out of the vault and of what is published next, as after a takedown request.

    Each may be given several times. Without any, a retraction that was cut off is finished.

    Example: dpf-release retract --source train/cat/0042.jpg --source 0043.jpg
    """
    from dpf_release import pipeline

    sources = [*(source or []), *(pipeline.read_names(source_file) if source_file else [])]
    project = _project(config, identity, fix_permissions, compute__device=device)
    report = pipeline.retract(project, row_id or [], sources)
    if not report.rows:
        print("Nothing to retract: these rows have gone before.")
        return
    counts = ", ".join(f"{split}: {count}" for split, count in report.rows.items())
    print(f"Retracted {sum(report.rows.values())} rows ({counts}). Delete the images too, if that is not done.")
    for name in report.lost:
        print(f"{name}: its candidate was not whole, and is removed. Write it: dpf-release poison --name {name}")
    for name, count in report.rebuilt.items():
        print_measurements(pipeline.measure(_project(config, identity, compute__device=device), name))
        print(f"{name}: {count} rows rebuilt. Next: dpf-release package --name {name}, as version {report.version}")
    if not report.released_rows:
        print("All of them were in test, which is never released: the release stays as it is.")


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
    from dpf_release.signing import fingerprint, read_public_key
    from dpf_release.structure import verify_deep
    from dpf_release.verification import verify as compare

    problems = (verify_deep if deep else compare)(release, public_key)
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


@key_app.command("new")
def key_new(out: Annotated[Path, typer.Option("--out", help="The private key's file; a new one.")]) -> None:
    """Make a key pair to sign releases with: the private key, and OUT.pub.pem to give to your users.

    Example: dpf-release key new --out ~/owner-key
    """
    from dpf_release.signing import new_key

    public, of_key = new_key(out)
    print(f"Wrote {out} (private: keep it, and keep it out of every release) and {public} (public).")
    print(f"Fingerprint of the public key: {of_key}")


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
    from dpf_release.audit import audit as run
    from dpf_release.audit import print_audit, project_of, write_page

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
    from dpf_release.inspection import inspect as run

    for table in run(path, size, width, trust_code=trust_code):
        _print_table(table.title, table.header, table.rows)


@app.command()
def demo(out: Annotated[Path, typer.Option("--out", help="A new folder.")] = Path("dpf-demo")) -> None:
    """Run the whole path on scikit-learn's digits: two minutes, no download.

    Example: dpf-release demo --out /tmp/dpf-demo
    """
    from dpf_release.demo import demo as run

    result = run(out)
    print_measurements(result.measurements)
    print("\nAttacks:")
    for attacked in result.attacks:
        print(f"  {attacked}")
    print(f"\ndpf-release package: {result.refusal}")
    print(f'\ndpf-release package --accept-risk "{result.accepted_risk}"\n\nPublic files:')
    for name in result.public_files:
        print(f"  {name}")
    print(f"\n{result.not_claimed}")
    print(f"\nPictures (private): {result.figure}\nRelease: {result.release}\n{result.seconds:.0f} s")
