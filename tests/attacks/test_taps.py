"""What can be read behind blocks of φ2, out of its answers, and out of one row by itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dpf_release.attacks import a02_deep_tap
from dpf_release.attacks import a07_optimisation as optimisation
from dpf_release.attacks.a01_clean_decoders import StrawMen
from dpf_release.attacks.a02_deep_tap import DeepTap, Outputs, drop_out
from dpf_release.attacks.a07_optimisation import (
    COST,
    FEWEST_ROWS,
    RESTARTS,
    ROWS,
    STEPS,
    DeepImagePrior,
    PerSample,
    Pixels,
    rows_within,
)
from dpf_release.attacks.interface import Reconstructions
from dpf_release.attacks.threat_models import Budget, HeldPictures, HeldRows, Remembered
from dpf_release.attacks.toolkit import trained
from dpf_release.attacks.toolkit.taps import WIDEST, open_taps, standard, together
from dpf_release.core.arrays import Rows
from dpf_release.evaluation.profiles import PROFILES, minutes, within
from dpf_release.evaluation.score_reconstructions import score_decoders
from dpf_release.evaluation.scoring import score_pictures
from dpf_release.evaluation.suite import attack
from dpf_release.evaluation.targets import Pool, Target, Truth
from dpf_release.models.hooks import split
from dpf_release.models.zoo import build_network
from dpf_release.owner.project import Project
from dpf_release.poisoning.plan import Contributors
from small_pictures import likeness, pictures, view_of


def half_seen() -> tuple[nn.Module, nn.Module]:
    """φ1 of 24 channels at half the size; φ2 whose first block forgets 12 of them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        phi_1 = nn.Conv2d(3, 24, 2, stride=2)
        first = nn.Conv2d(24, 16, 1)
        first.weight.data[:, 12:] = 0
        phi_2 = nn.Sequential(first, nn.LeakyReLU(0.3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
    return phi_1, phi_2


# --------------------------------------------------------------------------------------------- φ1 of Q


def test_features_of_q_are_computed_once_and_are_what_phi_1_makes_of_each_picture() -> None:
    view, pixels, asked = view_of(*half_seen(), torch.rand(4, 24, 8, 8), Budget(1, 1, 0)), pictures(20, seed=5), []

    def read(rows: Rows) -> Tensor:
        asked.extend(rows.tolist())
        return pixels[torch.from_numpy(rows)]

    row_bytes = 24 * 8 * 8 * 4
    for room, computed in ((20, [0, 3, 9, 11, 19]), (10, [0, 3, 9, 11, 11, 19])):
        asked.clear()
        held_pictures = HeldPictures(20, read, Remembered(room * row_bytes))
        for rows in (np.array([3, 9, 11]), np.array([9, 0, 3, 19]), np.array([11])):
            found = view.features_of(held_pictures, rows)
            assert torch.allclose(found, view.features(pixels[torch.from_numpy(rows)]), atol=1e-6)
            assert found.is_contiguous(memory_format=torch.channels_last)
        assert sorted(asked[1:]) == computed  # but for the first, by which the room is measured
    bare = HeldPictures(20, read)
    asked.clear()
    for _ in range(2):
        view.features_of(bare, np.array([1]))
    assert asked == [1, 1]


# --------------------------------------------------------------------------------------------- taps


def test_taps_of_a_resnet_are_what_its_blocks_return() -> None:
    network = build_network("resnet20_cifar", 5, {"width": 8}).eval()
    halves = split(network, "conv3_1", (32, 32))
    rows, returned = torch.rand(2, 16, 16, 16), []
    for block in (network.layer2[1], network.layer2[2], *network.layer3):
        rows_after = block(returned[-1] if returned else rows)
        returned.append(rows_after)
    view = view_of(halves.featurizer, halves.classifier, rows, Budget(1, 1, 0))
    taps = open_taps(view)
    assert len(taps) == 4
    assert all(torch.equal(found, returned[k]) for found, k in zip(taps.of(rows), (0, 1, 3, 4), strict=True))
    assert len(open_taps(view, most=2)) == 2


@pytest.mark.parametrize(
    ("arch", "hook", "size"),
    [
        ("vgg11", "features.5", 32),
        ("mobilenet_v2", "features.4", 64),
        ("convnext_tiny", "features.3.1", 64),
        ("densenet121", "features.transition1", 64),
    ],
)
def test_any_network_has_taps_that_are_maps(arch: str, hook: str, size: int) -> None:
    halves = split(build_network(arch, 5).eval(), hook, (size, size))
    rows = torch.rand(2, *halves.hook.shape)
    taps = open_taps(view_of(halves.featurizer, halves.classifier, rows, Budget(1, 1, 0)))
    found = taps.of(rows)
    assert 2 <= len(found) == len(taps) <= 4
    assert all(tap.ndim == 4 and tap.shape[2] > 1 for tap in found)
    assert not torch.equal(found[0], rows)
    assert together(found).shape == (2, sum(tap.shape[1] for tap in found), *found[0].shape[2:])


class Undecided(nn.Module):
    """Asks for a value: torch.fx cannot follow it."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns (N, C, H, W)."""
        return x if x.sum() > 0 else -x


def test_a_sequence_is_opened_even_where_it_cannot_be_traced_and_without_maps_there_are_the_answers() -> None:
    phi_1, phi_2 = half_seen()
    rows = torch.rand(2, 24, 8, 8)
    stubborn = nn.Sequential(Undecided(), nn.Conv2d(24, 6, 3, padding=1), Undecided(), *list(phi_2)[2:4])
    (found,) = open_taps(view_of(phi_1, stubborn, rows, Budget(1, 1, 0))).of(rows)
    assert torch.equal(found, stubborn[:3](rows))
    pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 4))
    taps = open_taps(view_of(phi_1, pooled, rows, Budget(1, 1, 0)))
    assert taps.names == ("outputs",)
    assert torch.equal(taps.of(rows)[0][:, :, 0, 0], pooled(rows))


def test_taps_are_standardised_on_q_and_wide_ones_cut_to_their_principal_channels() -> None:
    phi_1, _ = half_seen()
    wide = nn.Sequential(nn.Conv2d(24, 300, 1), nn.ReLU(), nn.Conv2d(300, 7, 1), nn.Conv2d(7, 2, 8))
    view = view_of(phi_1, wide, torch.rand(2, 24, 8, 8), Budget(1, 1, 0))
    taps = open_taps(view)
    features = view.features(view.public.read(np.arange(256)))
    raw, scaled = taps.of(features), standard(view, taps)(taps.of(features))
    assert [tap.shape[1] for tap in raw] == [300, 7]
    assert [tap.shape[1] for tap in scaled] == [WIDEST, 7]
    assert float(raw[1].mean(dim=(0, 2, 3)).abs().max()) > 0.05
    assert float(scaled[1].mean(dim=(0, 2, 3)).abs().max()) < 1e-3
    assert torch.allclose(scaled[1].std(dim=(0, 2, 3)), torch.ones(7), atol=1e-2)
    strongest = scaled[0].std(dim=(0, 2, 3))[-20:]  # those of least variance are held down
    assert torch.allclose(strongest, torch.ones(20), atol=1e-2)


def test_no_row_loses_all_of_its_taps_and_many_lose_one() -> None:
    taps = [torch.ones(400, 2, 3, 3), torch.ones(400, 5, 2, 2)]
    first, second = (tap.mean(dim=(1, 2, 3)) for tap in drop_out(taps, np.random.default_rng(0)))
    assert bool((first + second > 0).all())
    assert 0.05 < float((first == 0).float().mean()) < 0.2


# --------------------------------------------------------------------------------------------- A2, A7


def test_what_phi_2_undoes_is_no_defence_behind_its_blocks() -> None:
    phi_1, phi_2 = half_seen()
    private = pictures(48, seed=9)
    with torch.no_grad():
        rows = phi_1((private.float() / 255 - 0.5) / 0.25)
    poisoned = rows.clone()
    poisoned[:, 12:] = 8 * torch.randn(rows[:, 12:].shape, generator=torch.Generator().manual_seed(1))
    view = view_of(phi_1, phi_2, poisoned, Budget(4000, 3, 0))
    original, everyone = private.float() / 255, np.arange(48)
    straw_man = StrawMen().run(replace(view, budget=Budget(4000, 1, 0)))
    before = [likeness(found(everyone), original) for found in straw_man.decoders.values()]
    answer = DeepTap().run(view)
    assert list(answer.decoders) == ["all taps"]  # where there is one, it is not looked at twice
    behind = likeness(answer.decoders["all taps"](everyone), original)
    assert behind > 0.7
    assert max(before) < behind - 0.2
    assert torch.allclose(phi_2(poisoned), phi_2(rows), atol=1e-4)


@pytest.mark.parametrize("drawn", [Pixels, DeepImagePrior])
def test_each_picture_is_sought_by_itself(drawn: type[Pixels] | type[DeepImagePrior]) -> None:
    one = drawn(3, (18, 12), torch.Generator().manual_seed(0))
    pixels = one()
    assert pixels.shape == (3, 3, 18, 12)
    assert 0 <= float(pixels.detach().min()) <= float(pixels.detach().max()) <= 1
    pixels[1].sum().backward()
    for parameter in one.parameters():
        assert parameter.grad is not None
        moved = parameter.grad.reshape(3, -1).abs().sum(dim=1) > 0
        assert moved.tolist() == [False, True, False]


def test_pictures_are_found_for_some_rows_and_not_sought_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimisation, "FEWEST_ROWS", 6)
    monkeypatch.setattr(optimisation, "STEPS", 80)
    monkeypatch.setattr(optimisation, "AT_ONCE", 4)
    monkeypatch.setattr(optimisation, "RESTARTS", 2)
    phi_1, phi_2 = half_seen()
    private = pictures(30, seed=9)
    with torch.no_grad():
        rows = phi_1((private.float() / 255 - 0.5) / 0.25)
    view = view_of(phi_1, phi_2, rows, Budget(100, 1, 0))
    answer = PerSample().run(view)
    assert answer.answered is not None
    assert answer.answered.tolist() == [0, 6, 12, 17, 23, 29]
    original = private[torch.from_numpy(answer.answered)].float() / 255
    for found in answer.decoders.values():
        assert likeness(found(answer.answered), original) > 0.8
        assert likeness(found(answer.answered[::-1].copy()), original) < 0.5
    monkeypatch.setattr(optimisation, "_seek", None)
    again = PerSample().run(view)
    assert torch.equal(again.decoders["pixels"](answer.answered), answer.decoders["pixels"](answer.answered))
    with pytest.raises(TypeError):  # nothing is kept of another bank
        PerSample().run(view_of(phi_1, phi_2, rows + 1, view.budget))


def test_a_smaller_budget_seeks_fewer_pictures_and_costs_what_they_cost() -> None:
    attack, decoder_steps = PerSample(), 2 * COST * RESTARTS * STEPS
    for images, share, rows in (
        (1_000_000, 1.0, ROWS),
        (500_000, 1.0, 125),
        (500_000, 0.5, 62),
        (100, 1.0, FEWEST_ROWS),
    ):
        budget = Budget(images, 6, 16, share=share)
        assert rows_within(budget) == rows
        assert attack.trainings(budget) * budget.bank_images == pytest.approx(rows * decoder_steps)
    full = Budget(1_000_000, 6, 16)
    assert minutes([attack], full, rate=decoder_steps / 60) == pytest.approx(ROWS + 125)  # and those of weak noise
    halved = within([attack], full, decoder_steps / 60, 200)
    assert halved.images == 500_000
    assert within([attack], full, decoder_steps / 60, 400) == full


# --------------------------------------------------------------------------------------------- the harness


def test_an_answer_for_some_rows_scores_as_those_rows_do_among_all_the_pictures() -> None:
    originals = pictures(120, seed=2)
    pools = tuple(Pool(rows, rows, label) for label, rows in enumerate(np.split(np.arange(120), 2)))
    truth = Truth(pools, lambda rows: originals[torch.from_numpy(rows)], np.repeat([0, 1], 60))
    noise = torch.rand(originals.shape, generator=torch.Generator().manual_seed(4))

    def noisy(positions: Rows) -> Tensor:
        at = torch.from_numpy(truth.asked[positions])
        return 0.6 * originals[at].float() / 255 + 0.4 * noise[at]

    itself = Contributors.themselves
    target = Target("", HeldRows(np.zeros(120), lambda rows: rows), lambda bank: bank, itself, "")
    places = np.array([3, 10, 61, 119])
    part = score_decoders(Reconstructions({"one": noisy}, places), target, truth)["one"]
    whole = score_pictures(truth, itself, noisy)
    assert part.primary == pytest.approx(whole.primary[places], abs=1e-6)
    assert part.own.all()
    assert [len(pool.rows) for pool in truth.at(places).pools] == [2, 2]
    assert truth.at(places).among == truth.among == 60
    assert truth.at(places[:2]).asked.tolist() == [3, 10]


@pytest.mark.slow
def test_a_decoder_of_the_answers_finds_what_they_say_and_nothing_in_anothers_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(a02_deep_tap, "WIDTH", 48)  # what learns fast on few pictures
    monkeypatch.setattr(trained, "TRAINING_BATCH", 32)
    phi_2 = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten())  # 48 answers: the picture at 4×4
    originals = pictures(40, seed=9)
    view = view_of(nn.AvgPool2d(2), phi_2, torch.empty(0), Budget(3000, 1, 0))
    rows, shown = view.features(originals), []
    for bank in (rows, rows.roll(1, dims=0)):
        released = HeldRows(np.zeros(len(bank), np.int64), lambda at, bank=bank: bank[torch.from_numpy(at)].numpy())  # type: ignore[misc]
        answer = Outputs().run(replace(view, bank=released, asked=np.arange(len(bank))))
        shown.append(likeness(answer.decoders["outputs alone"](np.arange(len(bank))), originals.float() / 255))
    assert shown[0] > shown[1] + 0.05


@pytest.mark.slow
def test_the_battery_says_what_the_answers_give_away_and_for_how_many_rows_each_attack_answered(
    project_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimisation, "FEWEST_ROWS", 5)
    monkeypatch.setattr(optimisation, "ROWS", 5)
    monkeypatch.setattr(optimisation, "STEPS", 1)
    monkeypatch.setattr(PerSample, "rows", 5)
    monkeypatch.setattr(a02_deep_tap, "WIDTH", 32)
    for module in ("profiles", "harness"):
        monkeypatch.setattr(f"dpf_release.evaluation.{module}.registered", lambda: [DeepTap(), PerSample()])
    full = attack(Project.open(project_folder / "dpf.toml"), profile="full", images=32)
    assert -1 < full.references["outputs"].low < full.references["outputs"].high < 1
    assert PROFILES["standard"].runs(Outputs())
    assert not PROFILES["quick"].runs(Outputs())
    rows = {result.code: result.rows for result in full.attacks}
    assert rows["A7"] == 5 < rows["A2"]
    reasons = {result.code: " ".join(result.reasons) for result in full.attacks}
    assert "rows, the profile wants" in reasons["A2"]
    assert "rows, the profile wants" not in reasons["A7"]
