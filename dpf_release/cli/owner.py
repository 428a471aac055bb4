"""The owner's commands, in their order of work; each parses, calls one step, prints what it returned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from dpf_release.cli.app import (
    CONFIG,
    ConfigOption,
    DeviceOption,
    EpochsOption,
    FixPermissionsOption,
    IdentityOption,
    NameOption,
    RestartOption,
    ShardSizeOption,
    TrustCodeOption,
    app,
    open_project,
)
from dpf_release.cli.printing import (
    print_bank,
    print_bound,
    print_measurements,
    print_spent,
    print_table,
    print_unreadable,
)

SeedOption = Annotated[int, typer.Option("--seed", help="Of all that is drawn.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON (docs/attacks.md) in the place of tables.")]


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="The project's folder; made where missing.")],
    from_release: Annotated[
        Path | None, typer.Option("--from-release", help="Share the φ1 and φ2 of this release, as a second owner.")
    ] = None,
    private: Annotated[Path | None, typer.Option("--private", help="The private images.")] = None,
    public: Annotated[Path | None, typer.Option("--public", help="Images that anyone can have.")] = None,
    weights: Annotated[Path | None, typer.Option("--weights", help="Weights of a pretrained network.")] = None,
    never_saw_private: Annotated[
        bool | None,
        typer.Option("--weights-never-saw-private/--weights-saw-private", help="Your statement about the weights."),
    ] = None,
) -> None:
    """Write a commented dpf.toml and an empty vault.

    Example: dpf-release init my-release --private photos --public public-photos
    """
    from dpf_release.owner.init import init as run

    if weights and never_saw_private is None:
        never_saw_private = typer.confirm(
            "Were these weights trained without any of the private images?", default=False
        )
    made = run(
        folder,
        from_release=from_release,
        private=private,
        public=public,
        weights=weights,
        never_saw_private=bool(never_saw_private),
    )
    if made.warning:
        print(f"Note: {made.warning}")
    print(f"Wrote {made.config} and {made.vault}. Next: edit dpf.toml, then `dpf-release featurize` in {folder}")


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
    from dpf_release.owner.train import train as run

    project = open_project(config, identity, fix_permissions)
    trained = run(project, epochs=epochs, device=device, restart=restart)
    print_unreadable(trained.unreadable)
    unit = project.config.task.unit
    for split, score in trained.scores.items():
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
    own_classes: Annotated[
        bool, typer.Option("--own-classes", help="Downstream: T's classes need not be the release's.")
    ] = False,
    draw: Annotated[
        bool, typer.Option("--draw", help="Downstream: draw rows from T's statistics, as the release's were.")
    ] = False,
    epsilon: Annotated[
        float | None, typer.Option("--epsilon", help="Downstream, with --draw: a privacy bound for T.")
    ] = None,
    delta: Annotated[float, typer.Option("--delta", help="Downstream, with --epsilon: of the bound.")] = 1e-5,
    seed: Annotated[int, typer.Option("--seed", help="Downstream, with --draw: of the draws.")] = 0,
    identity: IdentityOption = None,
    fix_permissions: FixPermissionsOption = False,
) -> None:
    """Split Φ and write the private bank φ1(S) into the vault.

    Example: dpf-release featurize --shard-size "500 MB"

    On several processes, GPUs or machines with a shared folder: torchrun --nproc-per-node 2 -m dpf_release featurize

    Downstream, with a release and images of your own: dpf-release featurize --release R --images T --out B

    Other classes than the release's, to be combined with its drawn rows: ... --own-classes --draw
    """
    if release or images or out:
        if not (release and images and out):
            raise typer.BadParameter("--release, --images and --out go together")
        if restart:
            raise typer.BadParameter(
                "--restart is the owner's; to begin a bank of your own anew, remove --out's folder"
            )
        if not draw and epsilon is not None:
            raise typer.BadParameter("--epsilon is of rows that are drawn: add --draw")
        from dpf_release.poisoning.mixture import Draw
        from dpf_release.release.featurize import featurize_new
        from dpf_release.release.release import Release

        index, bad = featurize_new(
            Release.open(release),
            images,
            out,
            shard_size=shard_size or "1 GiB",
            max_bad=max_bad,
            device=device or "auto",
            own_classes=own_classes,
            draw=Draw(seed, epsilon, delta) if draw else None,
        )
        print_bank(index, out, bad)
        return
    from dpf_release.owner.featurize import featurize as run

    project = open_project(config, identity, fix_permissions)
    written = run(project, device=device, shard_size=shard_size, restart=restart)
    print_bank(written.index, written.folder, written.unreadable)


@app.command()
def functions(trust_code: TrustCodeOption = False) -> None:
    """List the poisoning functions, with their parameters, bounds and defaults.

    With --trust-code also those of installed packages.

    Example: dpf-release functions
    """
    from dpf_release.poisoning.chain import TABLE_HEADER, table_rows

    print_table("Poisoning functions", TABLE_HEADER, table_rows(trust_code))
    print("In dpf.toml, or with fit-poison --function: NAME, NAME:PARAMETER=VALUE,..., or a chain NAME+NAME.")


@app.command("fit-poison")
def fit_poison(
    config: ConfigOption = CONFIG,
    name: NameOption = "default",
    function: Annotated[
        str | None, typer.Option("--function", help="dpf, recombine:k=20, gaussian-filter+dpf, ... (see dpf.toml)")
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
    from dpf_release.owner.fit_poison import fit_poison as run

    fitted = run(
        open_project(config, identity, fix_permissions),
        name=name,
        function=function,
        objective=objective,
        lambda_=lambda_,
        epochs=epochs,
        device=device,
        restart=restart,
    )
    print_unreadable(fitted.unreadable)
    facts = [f"{key} {value:.4g}" for key, value in fitted.last.items()] or ["a stationary function: nothing to train"]
    print(f"Fitted {name}: {', '.join(facts)}. Next: dpf-release poison --name {name}")


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
    from dpf_release.owner.poison import poison as run

    project = open_project(config, identity, fix_permissions)
    candidate = run(project, name=name, device=device, shard_size=shard_size, restart=restart)
    print_measurements(candidate.measurements)
    if candidate.pictures:
        print(f"Pictures: {candidate.pictures} (private)")


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
    seed: SeedOption = 0,
    as_json: JsonOption = False,
    public: Annotated[
        Path | None,
        typer.Option("--public", help="Also write a page that anyone may see: its numbers, and pictures of Q only."),
    ] = None,
    own: Annotated[
        list[str] | None,
        typer.Option("--attack", help="Also run an attack from outside, package.module:Class; with --trust-code."),
    ] = None,
    trust_code: TrustCodeOption = False,
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
    from dpf_release.attacks.interface import load_attack
    from dpf_release.evaluation.report.public_page import publish_page
    from dpf_release.evaluation.report.terminal import print_attacks
    from dpf_release.evaluation.suite import attack as run

    project = open_project(config, identity, fix_permissions, device)
    if budget is not None and images is not None:
        raise typer.BadParameter("expected one of --budget and --images, found both: each says how much is trained")
    if own and not trust_code:
        raise typer.BadParameter("--attack imports and runs code that is not ours: say --trust-code too")
    for path in own or ():
        load_attack(path)
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
    seed: SeedOption = 0,
    as_json: JsonOption = False,
    device: DeviceOption = None,
    identity: IdentityOption = None,
    fix_permissions: FixPermissionsOption = False,
) -> None:
    """Draw privacy against utility for several fitted functions, from the candidate of each.

    Runs `attack` where it was not run yet with this profile; a run that was cut off goes on.

    Example: dpf-release compare equivalence paper --profile quick
    """
    from dpf_release.evaluation.frontier import compare as run
    from dpf_release.evaluation.report.terminal import print_frontier

    project = open_project(config, identity, fix_permissions, device)
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
    without_report: Annotated[
        bool,
        typer.Option(
            "--without-report",
            help="Publish no number that was measured on the images: no privacy bound covers those.",
        ),
    ] = False,
    identity: IdentityOption = None,
    fix_permissions: FixPermissionsOption = False,
) -> None:
    """Check the candidate and publish it: the only command that writes public files.

    Example: dpf-release package --name default --out release --sign ~/owner-key
    """
    from dpf_release.publish.package import package as run

    project = open_project(config, identity, fix_permissions)
    manifest = run(project, name, out, sign, second_function, accept_risk, without_report)
    print(f"Published {manifest.name} {manifest.version} in {out or project.config.folder / 'release'}:")
    for file in manifest.files:
        print(f"  {file.path}  {file.bytes} bytes  {file.role}")
    if manifest.version != (asked := project.config.release.version):
        print(f"As {manifest.version}, and not as {asked}, which was published with rows that are retracted since.")
    made, not_made = (", ".join(claims) or "none" for claims in (manifest.claims.made, manifest.claims.not_made))
    print(f"Claims made: {made}. Claims not made: {not_made}.")
    if without_report:
        print("Nothing that was measured on the images is published.")
    elif not manifest.of_role("attack-report"):
        print("No attack battery was run on it.")
    if manifest.privacy:
        print_bound(manifest.privacy)


@app.command()
def privacy(
    config: ConfigOption = CONFIG,
    identity: IdentityOption = None,
    fix_permissions: FixPermissionsOption = False,
) -> None:
    """Show what of the images' privacy is spent and left, what one more fit costs, and all fits.

    Example: dpf-release privacy
    """
    from dpf_release.owner.privacy import privacy as run

    print_spent(run(open_project(config, identity, fix_permissions)))


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
    from dpf_release.owner.measure import measure
    from dpf_release.owner.retract import read_names
    from dpf_release.owner.retract import retract as run

    sources = [*(source or []), *(read_names(source_file) if source_file else [])]
    project = open_project(config, identity, fix_permissions, device)
    report = run(project, row_id or [], sources)
    for name in report.redrawn:
        print_measurements(measure(open_project(config, identity, device=device), name))
        print(f"{name}: fitted and drawn again. Next: dpf-release package --name {name}, as version {report.version}")
    if not report.rows:
        print("Nothing to retract: these rows have gone before.")
        return
    counts = ", ".join(f"{split}: {count}" for split, count in report.rows.items())
    print(f"Retracted {sum(report.rows.values())} rows ({counts}). Delete the images too, if that is not done.")
    for name in report.lost:
        print(f"{name}: its candidate could not be kept, and is removed. Write it: dpf-release poison --name {name}")
    for name, count in report.rebuilt.items():
        print_measurements(measure(open_project(config, identity, device=device), name))
        print(f"{name}: {count} rows rebuilt. Next: dpf-release package --name {name}, as version {report.version}")
    if not report.released_rows:
        print("All of them were in test, which is never released: the release stays as it is.")


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="A new folder.")] = Path("dpf-demo"),
    paper: Annotated[bool, typer.Option("--paper", help="The paper's function: attacked, and refused.")] = False,
) -> None:
    """Run the whole path on scikit-learn's digits: two minutes, no download.

    Example: dpf-release demo --out /tmp/dpf-demo
    """
    from dpf_release.cli.demo import demo as run

    run(out, paper=paper)
