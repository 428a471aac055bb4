"""A4, A9 and A12: without pairs, with a second release, and with the pieces of others."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from attackers import Memory
from dpf_release.attacks import a01_clean_decoders as straw_men
from dpf_release.attacks import a04_alignment
from dpf_release.attacks import a09_two_releases as two_releases
from dpf_release.attacks.a01_clean_decoders import StrawMen
from dpf_release.attacks.a04_alignment import (
    ALL,
    Alignment,
    AlignmentMap,
    _moments,
    alignments,
    discrepancy,
    match_covariances,
    match_moments,
)
from dpf_release.attacks.a09_two_releases import TwoFunctions, join
from dpf_release.attacks.a12_jigsaw import Jigsaw, beliefs, pools_of
from dpf_release.attacks.interface import Reconstructions
from dpf_release.attacks.threat_models import Budget, HeldRows, ReleaseView, TwoReleases
from dpf_release.attacks.toolkit import decoder, trained
from dpf_release.attacks.toolkit.pieces import Grid, find_swaps, fits, train_fitting
from dpf_release.attacks.toolkit.trained import seeded
from dpf_release.errors import NotGrantedError
from dpf_release.evaluation.controls import planted_target
from dpf_release.evaluation.targets import Target, candidate_target, draw_truth
from dpf_release.evaluation.views import Setting, grant
from dpf_release.owner.fit_poison import fit_poison
from dpf_release.owner.fitted import load_function
from dpf_release.owner.poison import write_candidate
from dpf_release.owner.project import Project
from dpf_release.owner.vault.ledger import releases, remember_release
from dpf_release.owner.workbench import Workbench, open_candidate, workbench_of
from dpf_release.poisoning.plan import FeatureSpec
from dpf_release.poisoning.recombine import Recombine
from small_pictures import likeness, pictures
from small_pictures import view_of as view_of_rows


@pytest.fixture(scope="module")
def setting(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    folder = shutil.copytree(finished, tmp_path_factory.mktemp("aligned") / "shapes")
    project = Project.open(folder / "dpf.toml")
    workbench = replace(workbench_of(project), kept=Memory())  # type: ignore[arg-type]
    truth = draw_truth(workbench, target_of(workbench, "clean"), 200, seed=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trained, "TRAINING_BATCH", 32)
        patch.setattr(a04_alignment, "SAMPLED", 256)
        yield Setting(workbench, truth, Budget(images=1000, decoders=1, shadows=0), 0)


def target_of(workbench: Workbench, name: str) -> Target:
    return planted_target(workbench, name, 0)


def view_of(setting: Setting, name: str) -> ReleaseView:
    return grant(ReleaseView, target_of(setting.workbench, name), setting)


# --------------------------------------------------------------------------------------------- A4


def test_matched_covariances_undo_a_scaling_of_channels_and_any_map_gets_the_right_moments() -> None:
    draws = torch.Generator().manual_seed(0)
    mixing, turning = (torch.linalg.qr(torch.randn(6, 6, generator=draws))[0] for _ in range(2))
    mixing = mixing * torch.arange(1, 7)
    clean = torch.einsum("kc,nchw->nkhw", mixing, torch.randn(400, 6, 4, 4, generator=draws)) + 1
    scale = torch.tensor([0.5, 2.0, 1.0, 3.0, 0.7, 1.3])[:, None, None]
    turned = torch.einsum("kc,nchw->nkhw", turning, clean)

    def moments(rows: Tensor) -> Any:
        return _moments([(rows, np.zeros(len(rows), np.int64))])[ALL]

    of_clean = moments(clean)
    undone = match_covariances(moments(clean * scale + 2), of_clean)(clean * scale + 2)
    assert torch.allclose(undone, clean, atol=1e-2)
    matched = moments(match_covariances(moments(turned), of_clean)(turned)).covariance
    apart = moments(match_moments(moments(turned), of_clean)(turned)).covariance
    wrong, still_wrong = (float((of - of_clean.covariance).abs().max()) for of in (matched, apart))
    assert wrong < 0.2 * still_wrong


def test_discrepancy_is_small_of_two_samples_of_one_distribution_only() -> None:
    draws = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, 300, 5, generator=draws)
    assert 0 <= float(discrepancy(one, other)) < 0.02
    assert float(discrepancy(one * 2, other)) > 0.05
    assert float(discrepancy(one + 1, other)) > 0.05


def test_a_map_starts_as_the_transport_that_it_is_given() -> None:
    mean, deviation, wanted_mean, wanted = statistics = torch.rand(4, 3) + 0.5
    rows = torch.randn(5, 3, 4, 4)
    transport = torch.tensor([[0.0, 1, 0], [1, 0, 0], [0, 0, 1]])
    scaled = ((rows - mean[:, None, None]) / deviation[:, None, None])[:, [1, 0, 2]]
    expected = scaled * wanted[:, None, None] + wanted_mean[:, None, None]
    network = AlignmentMap(statistics, transport, non_negative=False)
    assert torch.allclose(network(rows), expected, atol=1e-6)
    clipped = AlignmentMap(statistics, transport, non_negative=True)(rows)
    assert torch.equal(clipped, network(rows).relu())


def test_every_alignment_brings_a_scaled_bank_nearer_to_clean_rows_where_q_is_like_s(setting: Setting) -> None:
    view = view_of(setting, "clean")
    clean = view.features(view.public.read(np.arange(len(view.public))))  # Q itself: all that differs is the scaling
    draws = torch.Generator().manual_seed(0)
    scale, shift = 2 * torch.rand(2, 1, clean.shape[1], 1, 1, generator=draws) + 0.5
    scaled, labels = (clean * scale + shift).numpy(), view.answers(clean).argmax(1).numpy()
    view = replace(view, bank=HeldRows(labels, lambda rows: scaled[rows]), bank_subject="scaled")
    rows = np.arange(60)

    def left(found: Tensor) -> float:
        return float((found - clean[:60]).square().mean() / clean.var())

    before, after = left(view.rows(rows)), {name: left(aligned(rows)) for name, aligned in alignments(view).items()}
    assert {"moments", "whitening-colouring", "trained map"} <= set(after)
    assert max(after.values()) < before / 4, (before, after)


def test_moments_by_class_are_those_of_its_rows_and_scarce_classes_have_none(setting: Setting) -> None:
    view = view_of(setting, "clean")
    found = _moments([(view.rows(np.arange(20)), np.repeat([0, 3], 10))])
    assert set(found) == {ALL, 0, 3}
    assert found[ALL].rows == 20
    mean = view.rows(np.arange(10, 20)).mean(dim=(0, 2, 3)).double()
    assert torch.allclose(found[3].mean, mean, atol=1e-5)
    assert not torch.allclose(found[0].mean, mean, atol=1e-3)


@pytest.mark.slow
def test_the_map_is_trained_anew_for_another_bank_alone(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = replace(setting, budget=Budget(images=64, decoders=1, shadows=0))
    view = view_of(setting, "channel-affine")
    Alignment().run(view)
    monkeypatch.setattr(trained, "fit", None)
    assert set(Alignment().run(view).decoders) >= {"moments; rx2s2-c, SSIM, disturbed"}
    with pytest.raises(TypeError):
        Alignment().run(view_of(setting, "random-convolution"))


# --------------------------------------------------------------------------------------------- A12


@pytest.mark.parametrize(("patch", "k"), [(2, 2), (2, 5), (1, 4), (4, 3)])
def test_copies_tell_which_rows_swapped_pieces_and_of_what_size(setting: Setting, patch: int, k: int) -> None:
    clean = setting.workbench.private.rows
    view = view_of(setting, "clean")
    recombine = Recombine(FeatureSpec(view.feature_shape, view.non_negative), k=k, patch=patch)
    plan = recombine.plan(clean, view.phi_2, bytes(32))
    bank = HeldRows(clean.targets, lambda rows: recombine.apply(rows, clean, plan))
    group, side = find_swaps(replace(view, bank=bank))
    assert side == patch
    of_plan = plan.arrays["group"]
    together = group[:, None] == group
    truly = of_plan[:, None] == of_plan
    np.fill_diagonal(together, val=False)
    np.fill_diagonal(truly, val=False)
    assert (together & ~truly).sum() == 0
    assert together.sum() > 0.5 * truly.sum()


def test_clean_rows_swapped_nothing_and_then_those_that_phi_2_sees_alike_are_the_pool(setting: Setting) -> None:
    view = view_of(setting, "clean")
    group, patch = find_swaps(view)
    assert len(np.unique(group)) > 0.9 * len(view.bank)
    assert patch == 2
    pools = pools_of(view, group)
    assert pools.shape[0] == len(view.asked)
    assert (pools[:, 0] == view.asked).all()
    labels = view.bank.targets
    there = pools >= 0
    assert (labels[pools][there] == np.broadcast_to(labels[pools[:, :1]], pools.shape)[there]).all()


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 7, 5)])
def test_pieces_join_to_the_row_that_they_were_cut_from(shape: tuple[int, int, int]) -> None:
    rows, grid = torch.rand(4, *shape), Grid(shape, 2)
    cut = grid.cut(rows)
    assert cut.shape[1:3] == grid.size
    assert torch.equal(grid.join(cut), rows)
    assert not torch.equal(grid.join(cut.flip(1)), rows)


def test_beliefs_follow_what_fits_from_the_anchor_on() -> None:
    down, across, people = 3, 4, 3
    generator = torch.Generator().manual_seed(0)
    owner = torch.rand(down, across, people, generator=generator).argsort(dim=-1)  # whose each candidate is
    side = 3.0 * torch.eye(people)[owner].permute(2, 0, 1, 3)[None]  # (1, M, d, a, people)
    for anchor in range(people):
        prior = torch.zeros(1, down, across, people)
        prior[0, 1, 2] = torch.where(owner[1, 2] == anchor, 0.0, -1e4)
        shares = beliefs(prior, side, side, side, side)
        assert torch.allclose(shares.sum(dim=-1), torch.ones(1, down, across))
        assert (torch.gather(owner, 2, shares[0].argmax(dim=-1, keepdim=True)) == anchor).all()
        apart = beliefs(prior, *(torch.zeros_like(side),) * 4)
        assert float(apart[0, 0, 0].max()) == pytest.approx(1 / people, abs=1e-3)


def test_pieces_of_one_picture_fit_better_than_those_of_two(setting: Setting) -> None:
    view = replace(view_of(setting, "clean"), budget=Budget(images=3000, decoders=1, shadows=0))
    grid, fitting = Grid(view.feature_shape, 2), train_fitting(view, 2)
    cut = grid.cut(view.rows(view.asked[:40]))
    right, left, _, _ = fitting(cut)
    scores = fits(right[:, :, :-1], left[:, :, 1:]).flatten(0, 1)  # (places, 40, 40)
    found = (scores.argmax(dim=2) == torch.arange(40)).float().mean()
    assert float(found) > 4 / 40


def test_a_jigsaw_answers_for_each_anchor(setting: Setting) -> None:
    view = view_of(setting, "recombine-2")
    answer = Jigsaw().run(view)
    assert len(answer.decoders) == 4
    some = np.array([3, 0, 7])
    found = [of(some) for of in answer.decoders.values()]
    assert all(one.shape == (3, 3, 32, 32) for one in found)
    assert not torch.equal(found[0], found[2])


# --------------------------------------------------------------------------------------------- A9


def test_rows_of_two_releases_are_joined_by_what_phi_2_sees(setting: Setting) -> None:
    target = target_of(setting.workbench, "weak-noise")
    view = grant(TwoReleases, target, setting)
    assert isinstance(view, TwoReleases)
    order = np.random.default_rng([setting.seed, 9]).permutation(len(target.rows))
    own = np.argsort(order)[view.asked]
    assert (join(view)(view.asked) == own).mean() > 0.8
    assert (np.roll(join(view)(view.asked), 1) == own).mean() < 0.1
    first, second = view.rows(view.asked[:5]), view.other.read(own[:5])
    assert float((first - torch.from_numpy(np.asarray(second))).abs().max()) > 0  # another secret


def test_two_releases_give_away_more_than_one_does_and_wrongly_joined_less(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (decoder, straw_men):  # what learns fast on few pictures
        monkeypatch.setattr(module, "DECODERS", (("px1s2, L1", "px1s2", "l1", False),))
    monkeypatch.setattr(trained, "TRAINING_BATCH", 16)
    with seeded(0):
        phi_2 = nn.Sequential(nn.Conv2d(12, 8, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    phi_1, originals, everyone = nn.PixelUnshuffle(2), pictures(60, seed=9).float() / 255, np.arange(60)
    clean = phi_1((originals - 0.5) / 0.25)

    def noisy(seed: int) -> Tensor:
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))
        return clean + clean.std() * noise

    alone, other = view_of_rows(phi_1, phi_2, noisy(1), Budget(3000, 1, 0)), noisy(2)
    second = HeldRows(np.zeros(60, np.int64), lambda rows: other[torch.from_numpy(rows)].numpy())
    view = TwoReleases(**vars(alone), other=second)

    def reached(answer: Reconstructions) -> list[float]:
        return [likeness(of(everyone), originals) for of in answer.decoders.values()]

    one = reached(StrawMen().run(view))
    monkeypatch.setattr(two_releases, "join", lambda view: lambda rows: rows)
    both = reached(TwoFunctions().run(view))
    monkeypatch.setattr(two_releases, "join", lambda view: lambda rows: (rows + 1) % 60)
    strangers = reached(TwoFunctions().run(view))
    assert min(both) > max(one) > max(strangers)


def test_a_second_release_is_one_that_the_ledger_says_was_published_under_another_function(
    finished: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(finished, tmp_path / "shapes")
    project = Project.open(folder / "dpf.toml", {"poison.function": "gaussian-noise"})
    workbench = replace(workbench_of(project), kept=Memory())  # type: ignore[arg-type]
    target = candidate_target(workbench, open_candidate(project, "default"))
    setting = Setting(workbench, draw_truth(workbench, target, 40, seed=0), Budget(1000, 1, 0), 0)
    with pytest.raises(NotGrantedError, match="no other release"):
        grant(TwoReleases, target, setting)
    fit_poison(project, name="noise")
    write_candidate(project, "noise")
    other = candidate_target(workbench, open_candidate(project, "noise"))
    known, digest = releases(project.vault)[0], load_function(project, "noise").digest
    made = {"function": "noise", "function_digest": digest, "index_sha256": other.subject, "manifest_sha256": "0" * 64}
    remember_release(project.vault, known | made | {"published": False})
    with pytest.raises(NotGrantedError, match="no other release"):
        grant(TwoReleases, target, setting)
    remember_release(project.vault, known | made | {"published": True})
    view = grant(TwoReleases, target, setting)
    assert isinstance(view, TwoReleases)
    assert target.second()[1] == other.subject  # what the gate holds against the ledger
    rows = np.arange(len(view.other))
    read, there = (np.asarray(bank.read(rows)).reshape(len(rows), -1).sum(1) for bank in (view.other, other.rows))
    assert np.allclose(np.sort(read), np.sort(there))
    assert not np.allclose(read, there)
    again = {"index_sha256": "1" * 64, "manifest_sha256": "1" * 64, "function_digest": "2" * 64}
    remember_release(project.vault, known | made | again | {"published": True})
    with pytest.raises(NotGrantedError, match="no longer has the candidate 'noise' as it was"):
        grant(TwoReleases, target, setting)  # an older release is not taken in its place
