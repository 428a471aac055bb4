"""Rows that `mixture` draws from groups of images: their moments, and what they say of an image."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from dpf_release.errors import ConfigError
from dpf_release.poisoning import groups as of_groups
from dpf_release.poisoning.chain import Chain, build_chain, fit_chain
from dpf_release.poisoning.groups import Groups
from dpf_release.poisoning.mixture import Mixture
from dpf_release.poisoning.plan import FeatureSpec
from rows_in_memory import PHI_2, SECRET, Rows

SPEC = FeatureSpec((6, 2, 2), False)
CENTRES = np.array([[9.0, 0], [-9, 0], [0, 9], [0, -9]])  # of two groups in each of two classes


def in_groups(each: int, seed: int, centres: NDArray[np.float64] = CENTRES) -> tuple[Rows, NDArray[np.int64]]:
    """Rows around four centres along two axes, each class with two of them; and the centre of each row."""
    draw = np.random.default_rng(seed)
    at = np.repeat(np.arange(len(centres)), each)
    rows = draw.standard_normal((len(at), 24)) * np.linspace(1, 0.3, 24)
    rows[:, :2] += centres[at]
    ids = draw.integers(0, 256, (len(at), 16), dtype=np.uint8)
    return Rows(rows.reshape(-1, *SPEC.shape).astype(np.float32), at // 2, ids), at


def material(private: Rows) -> Any:
    public, _ = in_groups(400, 2, 1.2 * CENTRES)
    split = SimpleNamespace(rows=private, drawn_from=private, images=None, units=None)
    of_public = SimpleNamespace(rows=public, drawn_from=public)
    return SimpleNamespace(
        train=split, val=split, public=of_public, unit="image", outputs=2, secret=SECRET, device="cpu"
    )


def fitted(spec: str, private: Rows) -> tuple[Chain, Any, dict[str, float]]:
    chain = build_chain(spec, SPEC)
    plans, facts, _ = fit_chain(chain, material(private))
    return chain, plans["train"], facts


def nearest(rows: NDArray[np.float32]) -> NDArray[np.int64]:
    flat = rows.reshape(len(rows), -1)[:, None, :2]
    found: NDArray[np.int64] = np.square(flat - CENTRES).sum(2).argmin(1)
    return found


def test_rows_have_the_moments_of_their_group_of_the_private_images() -> None:
    private, at = in_groups(300, 1)
    chain, plans, _ = fitted("mixture:epsilon=inf,groups=2,components=24,rows=1000", private)
    drawn = chain.on(private, plans)
    rows, groups = drawn.read(np.arange(len(drawn))), plans[0].arrays["group"]
    assert (drawn.targets == nearest(rows) // 2).mean() > 0.9
    for group in range(4):
        mine = rows[groups == group].reshape(-1, 24)
        centre = nearest(mine.mean(0, keepdims=True)).item()
        of = private.features[at == centre].reshape(-1, 24)
        assert np.abs(mine.mean(0) - of.mean(0)).max() < 1.5
        of_class = private.features[at // 2 == centre // 2].reshape(-1, 24)
        _, shrunk = of_groups.moments(of.astype(np.float64), np.cov(of_class.T, bias=True))
        assert np.trace(np.cov(mine.T)) == pytest.approx(np.trace(shrunk), rel=0.1)
        assert np.trace(np.cov(of_class.T)) > 1.5 * np.trace(shrunk)  # the control
        others = private.features[at == (centre + 1) % 4].reshape(-1, 24)
        assert np.abs(mine.mean(0) - others.mean(0)).max() > 7  # the control


def test_a_row_can_be_drawn_for_an_image_of_ones_own_and_shows_its_group() -> None:
    private, _ = in_groups(300, 1)
    chain, _, _ = fitted("mixture:epsilon=inf,groups=2,components=24", private)
    own, at = in_groups(50, 3)
    plans = chain.plan(own, PHI_2, SECRET)
    rows, numbers = chain.on(own, plans).read(np.arange(len(own))), np.arange(len(own))
    assert (nearest(rows) == at).mean() > 0.9
    assert (chain.contributors(numbers, plans).foremost(numbers) == numbers).all()
    flat, clean = rows.reshape(len(rows), -1)[:, 2:], own.features.reshape(len(own), -1)[:, 2:]
    assert abs(np.corrcoef(flat.ravel(), clean.ravel())[0, 1]) < 0.1  # and nothing of the image beside
    one_group, _, _ = fitted("mixture:epsilon=inf,groups=1,components=24", private)
    alike = nearest(one_group.on(own, one_group.plan(own, PHI_2, SECRET)).read(numbers))
    assert (alike == at).mean() < 0.7  # the control: with one group a class it shows the class alone


def test_with_a_bound_no_row_is_drawn_for_an_image() -> None:
    private, _ = in_groups(300, 1)
    chain, _, _ = fitted("mixture:epsilon=100,delta=1e-5,components=24", private)
    with pytest.raises(ConfigError, match="belong to no image"):
        chain.plan(private, PHI_2, SECRET)


def test_what_groups_give_away_is_said_before_rows_are_drawn() -> None:
    private, _ = in_groups(300, 1)
    _, _, facts = fitted("mixture:epsilon=inf,groups=2,components=24", private)
    assert facts["linkage on average"] == pytest.approx(2 / of_groups.CANDIDATES)
    assert facts["linkage of an image, at most"] == pytest.approx(2 / of_groups.CANDIDATES)
    _, _, alone = fitted("mixture:epsilon=inf,groups=1,components=24", private)
    assert alone["linkage on average"] == pytest.approx(1 / of_groups.CANDIDATES)
    # Two groups of a class, of 50 and 350 images: the small one has 25 of 200 candidates.
    label, count = np.array([0, 0]), np.array([50, 350])
    empty = np.empty((0, 0), np.float32)
    groups = Groups(empty, label, empty, empty, empty, label, count, np.repeat([0, 1], count))
    owners = np.arange(400)
    owners[:20] = 0  # 20 of 50 images show one person
    said = groups.linkage(owners)
    assert said["linkage on average"] == pytest.approx(2 / 200)
    assert said["linkage of an image, at most"] == pytest.approx(1 / 25)
    assert said["of a person, at most"] == pytest.approx(20 / 50)
    assert groups.linkage(np.arange(400))["of a person, at most"] == pytest.approx(1 / 25)


def test_what_was_learned_comes_back_and_draws_the_same_rows() -> None:
    private, _ = in_groups(100, 1)
    for spec in ("mixture:epsilon=100,delta=1e-5,components=24", "mixture:epsilon=inf,groups=2,components=24"):
        chain, plans, _ = fitted(spec, private)
        again = build_chain(spec, SPEC)
        again.load({name: value.clone() for name, value in chain.state().items()})
        stage = again.stages[0]
        assert isinstance(stage, Mixture)
        redrawn = stage.draw("train", chain.stage_secret(SECRET, 0))
        assert all((redrawn.arrays[name] == values).all() for name, values in plans[0].arrays.items())
        rows = np.arange(50)
        assert (again.on(private, [redrawn]).read(rows) == chain.on(private, plans).read(rows)).all()
        other = stage.draw("train", bytes([1] * 32))
        assert (other.arrays["ids"][:50] != redrawn.arrays["ids"][:50]).any()
