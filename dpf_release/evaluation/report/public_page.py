"""Pictures that anyone may see: of Q, under a function of the same kind as P. No picture of S is read, nothing of P."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpf_release.attacks.interface import ATTACKS, Reconstructions
from dpf_release.attacks.threat_models import HeldPictures, HeldRows, ReleaseView, batches
from dpf_release.attacks.toolkit.poisoned_public import Poison
from dpf_release.attacks.toolkit.shadows import poison_with
from dpf_release.attacks.toolkit.trained import seeded, weights_sha256
from dpf_release.bank.rows import ComputedRows, Select
from dpf_release.evaluation.gallery import as_bytes, spread
from dpf_release.evaluation.profiles import PROFILES
from dpf_release.evaluation.report.headline import strongest
from dpf_release.evaluation.report.page import refuse_inside_release, write_public_page
from dpf_release.evaluation.targets import Pool, Target, Truth
from dpf_release.evaluation.views import Setting, grant, public_rows
from dpf_release.models.training import Recipe
from dpf_release.owner.adversaries import straw_man
from dpf_release.owner.project import Project
from dpf_release.owner.workbench import workbench_of
from dpf_release.poisoning.chain import build_chain, fit_chain
from dpf_release.poisoning.context import Material, Split
from dpf_release.poisoning.objective import Adversaries, TaskLoss
from dpf_release.poisoning.plan import Contributors, FeatureSpec
from dpf_release.release.attack_report import AttackReport

PICTURES = 1000  # of Q, as many as a function that mixes rows needs to choose among
EPOCHS, TRAINING_BATCH, LEARNING_RATE = 8, 64, 3e-3
KEPT = "public shadow function"
SEED = "the public page"  # of all that is drawn: nothing of P's secret is in it


def publish_page(project: Project, name: str, report: AttackReport, path: Path) -> None:
    """Writes a page that anyone may see: the numbers of a function's report, and pictures of Q under a shadow function.

    Raises:
        ConfigError: the file would lie inside a release.
        StorageError: it cannot be written, or another run works in the vault.
    """
    refuse_inside_release(path)
    with project.working(public=True, together=False):
        pictures = public_pictures(project, name, report)
    write_public_page(report, pictures, path)


def public_pictures(project: Project, name: str, report: AttackReport) -> dict[str, Tensor]:
    """What each attack makes of pictures of Q under a shadow function, as `gallery` names pictures.

    Only of attacks that need nothing but a release, and train and seek nothing on its bank: of others there are none.
    Of a function that was trained against attribute classifiers alone there are none at all. Of the vault, Φ's two
    parts, ψ, the attackers and P's recipe are read; of the report, what was run, how hard, and which way is strongest.
    """
    images, profile = project.public_images, PROFILES[report.profile]
    rows = np.concatenate([public_rows(images, split, report.seed) for split in ("val", "train")])[:PICTURES]
    pictures = HeldPictures(len(rows), lambda numbers: images.pictures.read(rows[numbers]))
    setting = Setting(workbench_of(project, name), _nothing_asked(len(rows)), profile.budget, report.seed)
    clean = _clean_view(setting, pictures)
    recipe = project.vault.read_record(project.vault.function(name) / "function.json", "fit-poison")["recipe"]
    poison = shadow_function(project, clean, pictures, recipe)
    if poison is None:
        return {}
    clean = replace(clean, function=recipe["function"])
    shadow = replace(clean, bank=poison(clean.bank)[0], bank_subject=f"{SEED}, poisoned")
    asked = spread(min(len(rows), len(images.rows("val")) or len(rows)))
    found: dict[str, Tensor] = {}
    originals, every = pictures.read(asked), np.arange(len(asked))
    reference: Tensor | None = None
    for result in report.attacks:
        attack, best = ATTACKS.get(result.code), strongest(result)
        if attack is None or best is None or attack.view is not ReleaseView or attack.of_bank:
            continue
        budget = replace(profile.budget, images=result.images)
        answers = [attack().run(replace(view, asked=asked, budget=budget)) for view in (clean, shadow)]
        of_clean, of_shadow = (
            answer.decoders.get(best.way) if isinstance(answer, Reconstructions) else None for answer in answers
        )
        if of_clean is None or of_shadow is None:
            continue
        if reference is None:  # of the first attack, A1: its decoders are those for clean rows
            reference = as_bytes(of_clean(every))
        shown = {"original": originals, "clean": reference, "attack": as_bytes(of_shadow(every))}
        found |= {f"{result.code}/{key}": tensor for key, tensor in shown.items()}
    return found


def shadow_function(
    project: Project, view: ReleaseView, pictures: HeldPictures, recipe: Mapping[str, Any]
) -> Poison | None:
    """A function of P's kind that has nothing of P: planned, and where it is learned fitted, on Q.

    The view's bank is φ1(Q), of these pictures, labelled by φ2; the recipe is what P was fitted by; the project has ψ.

    Returns:
        As `poison_with`. None where P was trained against attribute classifiers alone, which are of S: its
        shadow would poison nothing.
    """
    spec = FeatureSpec(view.feature_shape, view.non_negative)
    with seeded(int.from_bytes(hashlib.sha256(SEED.encode()).digest()[:4])):
        chain = build_chain(recipe["function"], spec)
    poison = poison_with(chain, view.phi_2, SEED)
    if chain.needs_adversaries and not recipe["straw_men"]:
        return None
    straw_men = {name: straw_man(project, name) for name in recipe["straw_men"]}
    # A file's name is made of this, and can be seen: ψ's weights keep a guess of P's recipe from being checked.
    subject = {
        **view.subject,
        "recipe": [recipe[key] for key in ("function", "objective", "lambda")],
        "straw_men": [[name, weights_sha256(network.state_dict())] for name, network in straw_men.items()],
        "epochs": EPOCHS,
        "pictures": len(pictures),
        "seed": view.seed,
    }
    if code := chain.outside_code():
        subject["code"] = code
    kept = view.kept.load(KEPT, subject)
    if kept is not None:
        chain.load(kept)
    elif chain.learns:
        fit_chain(chain, _material(view, pictures, recipe, Adversaries(straw_men)))
        view.kept.save(KEPT, subject, chain.state())
    for network in chain.networks():
        project.frozen(network)
    return poison


def _material(
    view: ReleaseView, pictures: HeldPictures, recipe: Mapping[str, Any], adversaries: Adversaries
) -> Material:
    """Q in the place of the private images; attribute classifiers, which are of S, are left out."""
    bank = ComputedRows(view.bank.targets, view.bank.read)
    training = Recipe(EPOCHS, min(TRAINING_BATCH, len(bank)), LEARNING_RATE, seed=view.seed, bf16=view.bf16)
    return Material(
        features=FeatureSpec(view.feature_shape, view.non_negative),
        phi_1=view.phi_1,
        phi_2=view.phi_2,
        task=TaskLoss(torch.from_numpy(bank.targets.std(axis=0) + 1e-6) if bank.targets.ndim == 2 else None),
        train=Split(bank, pictures.read),
        val=Split(Select(bank, np.empty(0, np.int64)), pictures.read),
        public=Split(bank, pictures.read),
        outputs=view.answers(view.features(pictures.read(np.arange(1)))).shape[1],
        adversaries=lambda: adversaries,
        objective=recipe["objective"],
        lambda_=recipe["lambda"],
        recipe=training,
        secret=hashlib.sha256(SEED.encode()).digest(),
        device=view.device,
        title="Fitting a shadow function for the public page",
    )


def _clean_view(setting: Setting, pictures: HeldPictures) -> ReleaseView:
    """A release whose bank is φ1(Q), labelled by φ2."""
    no_rows = HeldRows(np.zeros(len(pictures), np.int64), lambda rows: np.empty(0))
    refused = _refused("P, found that it is asked for")
    target = Target(SEED, no_rows, refused, contributors=lambda rows: Contributors.nobody(), subject=SEED)
    view, numbers = grant(ReleaseView, target, setting), np.arange(len(pictures))
    answers = torch.cat([view.answers(view.features(pictures.read(some))).cpu() for some in batches(numbers)])
    targets = answers.argmax(1) if view.task == "classification" else answers
    bank = HeldRows(targets.numpy(), lambda rows: view.features(pictures.read(rows)).cpu().numpy())
    return replace(view, bank=bank)


def _nothing_asked(count: int) -> Truth:
    """Numbers of the bank, and no picture of S."""
    every = np.arange(count)
    refused = _refused("private picture, found that one is read")
    return Truth((Pool(every, every, 0),), refused, np.zeros(count, np.int64))


def _refused(what: str) -> Callable[[Any], Any]:
    def refuse(_: Any) -> Any:
        raise AssertionError(f"expected a public page to need no {what}")

    return refuse
