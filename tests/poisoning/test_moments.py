"""Noisy sums: how far one unit moves them, and how well outputs of the mechanism can be told apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.special import ndtri
from scipy.stats import beta

from dpf_release.core.privacy import GRID, ROUNDING, Mechanism, composed, noisy
from dpf_release.poisoning import mixture, moments, noisy_classes, procedure
from dpf_release.poisoning.components import Components, principal_components
from dpf_release.poisoning.mixture import Mixture
from dpf_release.poisoning.moments import Noise, Sums, clip, noisy_sums, scaling, unit_weights
from dpf_release.poisoning.plan import FeatureSpec
from rows_in_memory import Rows

Numbers = NDArray[np.float64]
MECHANISM = Mechanism.calibrated(4, 1e-5, (0.1, 0.3, 0.6), "person")
NOISE = Noise(*MECHANISM.noise.values())
SHAPE = (3, 2)  # classes and cells


def vectors(sums: Sums, noise: Noise, runs: int) -> Numbers:
    """(runs, numbers) all that is released, each over its deviation; the classes of a run follow each other."""
    upper = np.triu_indices(sums.square.shape[-1])
    deviation = np.where(upper[0] == upper[1], noise.square, noise.square / math.sqrt(2))
    numbers = (sums.count / noise.count, sums.total / noise.total, sums.square[..., *upper] / deviation)
    return np.concatenate([part.reshape(runs, -1) for part in numbers], axis=1)


# ------------------------------------------------------------------------------------------------ sensitivity


@dataclass(frozen=True)
class Images:
    """Rows with their classes, cells and units."""

    rows: Numbers
    classes: NDArray[np.int64]
    cells: NDArray[np.int64]
    units: NDArray[np.int64]

    def without(self, unit: int) -> Images:
        kept = self.units != unit
        return Images(self.rows[kept], self.classes[kept], self.cells[kept], self.units[kept])


def some_images(seed: int, units: int, most: int, size: int, scale: float) -> Images:
    """Units of 1 to `most` rows; unit 0 of exactly `most`, some of which point one way."""
    draw = np.random.default_rng(seed)
    of = np.repeat(np.arange(units), [most, *draw.integers(1, most + 1, units - 1)])
    rows = draw.normal(size=(len(of), size)) * scale * np.exp(draw.normal(size=(len(of), 1)))
    alike = draw.random(len(of)) < draw.random()
    rows[alike] = rows[0]
    order = draw.permutation(len(of))
    classes, cells = (draw.integers(0, draw.integers(1, most + 1), len(of)) for most in SHAPE)
    return Images(rows[order], classes[order], cells[order], of[order])


@contextmanager
def parts(**replaced: Any) -> Iterator[None]:
    """Parts of the mechanism replaced, wherever they are called; rows are not."""
    with pytest.MonkeyPatch.context() as patched:
        for name, part in replaced.items():
            for module in (moments, mixture, noisy_classes, procedure):
                if hasattr(module, name):
                    patched.setattr(module, name, part)
        yield


def exact(values: Numbers, sigma: float | Numbers) -> Numbers:
    """In the place of `noisy`: values on the grid, without noise."""
    return GRID * np.round(values / GRID)


def released(images: Images) -> Numbers:
    """What the mechanism gives, where it adds no noise."""
    with parts(noisy=exact):
        sums = noisy_sums(images.rows, images.classes, images.cells, images.units, SHAPE, NOISE)
    return vectors(sums, NOISE, 1)[0]


def moved(images: Images, unit: int = 0) -> float:
    """How far the unit moves what is released, in deviations."""
    return float(np.linalg.norm(released(images) - released(images.without(unit))))


sizes = {
    "seed": st.integers(0, 2**32 - 1),
    "units": st.integers(1, 12),
    "size": st.integers(1, 8),
    "scale": st.sampled_from([0.0, 1e-6, 0.1, 0.5, 1.0, 30.0, 1e12]),
}


@settings(deadline=None, max_examples=300)
@given(**sizes)
def test_an_image_moves_what_is_released_by_no_more_than_the_bound(
    seed: int, units: int, size: int, scale: float
) -> None:
    assert moved(some_images(seed, units, 1, size, scale)) <= MECHANISM.mu


@settings(deadline=None, max_examples=300)
@given(most=st.integers(2, 12), **sizes)
def test_a_person_in_several_classes_moves_what_is_released_by_no_more_than_the_bound(
    most: int, seed: int, units: int, size: int, scale: float
) -> None:
    images = some_images(seed, units, most, size, scale)
    assert moved(images) <= MECHANISM.mu


@settings(deadline=None)
@given(most=st.integers(1, 12), **sizes)
def test_a_unit_changes_no_others_weights(most: int, seed: int, units: int, size: int, scale: float) -> None:
    images = some_images(seed, units, most, size, scale)
    with_it, without = (
        unit_weights(clip(each.rows), each.classes, each.cells, each.units, NOISE)
        for each in (images, images.without(0))
    )
    np.testing.assert_array_equal(with_it[images.units != 0], without)
    for unit in range(units):
        assert len(np.unique(with_it[images.units == unit])) == 1
    assert (with_it > 0).all()
    assert (with_it <= 1).all()


def test_a_row_of_full_norm_moves_what_is_released_by_the_bound() -> None:
    """So that the bound is no larger than it has to be."""
    for most in (1, 7):
        found = [moved(some_images(seed, 5, most, 4, 1e3)) for seed in range(20)]
        np.testing.assert_allclose(found, MECHANISM.mu, rtol=2 * ROUNDING)


def test_a_small_row_moves_it_by_less() -> None:
    assert moved(some_images(0, 5, 1, 4, 1e-3)) < 0.4 * MECHANISM.mu


def by_class(rows: Numbers, classes: Any, cells: Any, units: Any, noise: Noise) -> Numbers:
    """In the place of `unit_weights`: each class by itself."""
    weights = np.ones(len(rows))
    for label in np.unique(classes):
        mine = classes == label
        weights[mine] = unit_weights(rows[mine], classes[mine], cells[mine], units[mine], noise)
    return weights


def no_clip(rows: Numbers) -> Numbers:
    return rows


def ones(rows: Numbers, *others: Any) -> Numbers:
    return np.ones(len(rows))


@pytest.mark.parametrize(
    ("most", "broken"),
    [
        (1, {"clip": no_clip}),
        (1, {"clip": lambda rows: 1.01 * clip(rows)}),
        (9, {"unit_weights": by_class}),
        (2, {"unit_weights": ones}),
    ],
    ids=["not clipped", "clipped one percent too late", "persons class by class", "persons not weighted"],
)
def test_without_a_part_of_the_mechanism_a_unit_moves_it_further(most: int, broken: dict[str, Any]) -> None:
    with parts(**broken):
        furthest = max(moved(some_images(seed, 5, most, 4, 3.0)) for seed in range(30))
    assert furthest > 1.005 * MECHANISM.mu


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e200])
def test_a_row_that_is_not_finite_moves_what_is_released_by_no_more_than_the_bound(value: float) -> None:
    images = some_images(1, 8, 1, 4, 1.0)
    images.rows[images.units == 0, 1] = value
    with np.errstate(over="ignore"):
        found = moved(images)
    assert 0 < found <= MECHANISM.mu


def test_thousands_of_rows_and_their_order_stay_within_what_rounding_may_cost() -> None:
    """Neighbours are added up in another order, and rounded to the grid each by itself."""
    images = some_images(3, 20_000, 1, 16, 3.0)
    one = released(images)
    order = np.random.default_rng(0).permutation(len(images.rows))
    other = released(Images(*(part[order] for part in vars(images).values())).without(0))
    assert MECHANISM.mu * (1 - ROUNDING) < np.linalg.norm(one - other) <= MECHANISM.mu


def test_each_number_has_its_deviation_and_off_the_diagonal_a_smaller_one() -> None:
    """`vectors` divides by these: were the noise smaller than it says, the bound above would mean nothing."""
    many = 20_000
    sums = Sums(np.zeros((many, 1)), np.zeros((many, 1, 3)), np.zeros((many, 3, 3))).with_noise(NOISE)
    np.testing.assert_array_equal(sums.square, sums.square.transpose(0, 2, 1))
    seen = vectors(sums, NOISE, many)
    assert seen.shape == (many, 1 + 3 + 6)
    np.testing.assert_allclose(np.cov(seen.T), np.eye(10), atol=0.05)


# ------------------------------------------------------------------------------------------------ a lower bound of μ
#
# Many runs of the function on two neighbouring data sets. Half of the runs teach how to tell them apart; on the others
# the shares of right and wrong answers bound μ from below.

RUNS = 20_000  # for each data set: half of them teach
ERROR = 1e-5  # of a bound: by chance alone the right mechanism fails a test once in 50,000 times
Pair = tuple[Images, Images]
PUBLIC = np.random.default_rng(5).normal(size=(64, 2)) * (2.0, 1.0)


def fitted(images: Images) -> Numbers:
    """(RUNS, numbers) what `Mixture.fit` releases of the images, over its deviations.

    All that comes before the noise is the same in each run, so that noise alone is drawn again.
    """
    real, seen = Sums.with_noise, list[Numbers]()

    def many(sums: Sums, noise: Noise) -> Sums:
        counts, totals = (np.concatenate([part] * RUNS) for part in (sums.count, sums.total))
        repeated = Sums(counts, totals, np.stack([sums.square] * RUNS))
        seen.append(vectors(real(repeated, noise), noise, RUNS))
        return real(sums, noise)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Sums, "with_noise", many)
        fit(images)
    return seen[0]


def fit(images: Images) -> Mixture:
    """The function, fitted with a bound."""
    private, public = _rows(images.rows, images.classes), _rows(PUBLIC)
    material = SimpleNamespace(
        train=SimpleNamespace(rows=private, drawn_from=private, units=lambda: images.units),
        public=SimpleNamespace(rows=public, drawn_from=public),
        unit="person",
        outputs=SHAPE[0],
        ranges=None,
    )
    function = Mixture(FeatureSpec((2, 1, 1), False), epsilon=MECHANISM.epsilon, delta=MECHANISM.delta)
    function.fit(SimpleNamespace(material=material))  # type: ignore[arg-type]
    return function


def _rows(features: Numbers, classes: Any = None) -> Rows:
    targets = np.zeros(len(features), np.int64) if classes is None else classes
    return Rows(features.reshape(-1, 2, 1, 1).astype(np.float32), targets, np.zeros((len(features), 16), np.uint8))


def lower_bound(one: Numbers, other: Numbers) -> float:
    """Of μ, from what was released of two data sets (RUNS, numbers): by a linear discriminant and its threshold."""
    half = RUNS // 2
    apart = one[:half].mean(0) - other[:half].mean(0)
    within = (np.cov(one[:half].T) + np.cov(other[:half].T)) / 2
    direction = np.linalg.solve(within + 1e-9 * np.eye(len(within)), apart)
    found, others = one @ direction, other @ direction
    thresholds = np.quantile(np.concatenate([found[:half], others[:half]]), np.linspace(0.05, 0.95, 19))
    best = max(thresholds, key=lambda threshold: _bound(found[:half], others[:half], threshold))
    return _bound(found[half:], others[half:], best)


def _bound(found: Numbers, others: Numbers, threshold: float) -> float:
    """Clopper and Pearson's bounds of both shares, as a μ."""
    hits, alarms, runs = int((found > threshold).sum()), int((others > threshold).sum()), len(found)
    hit = beta.ppf(ERROR, hits, runs - hits + 1) if hits else 0.0
    alarm = beta.ppf(1 - ERROR, alarms + 1, runs - alarms) if alarms < runs else 1.0
    return float(ndtri(hit) - ndtri(alarm))


def pair(
    unit: list[list[float]], *, others: int = 20, classes: list[int] | None = None, at: tuple[float, float] = (12, 12)
) -> Pair:
    """Two data sets: 20 images along the first axis, half of them about each place, and the same beside a unit."""
    draw = np.random.default_rng(6)
    there = draw.normal(size=(others, 2)) * (0.3, 0.05)
    there[:, 0] += np.resize(at, others)
    rows = np.concatenate([there, np.array(unit, float)])
    labels = np.concatenate([np.zeros(others, int), classes or [0] * len(unit)]).astype(np.int64)
    units = np.concatenate([np.arange(1, others + 1), np.zeros(len(unit), int)]).astype(np.int64)
    both = Images(rows, labels, np.zeros(len(rows), np.int64), units)
    return both, both.without(0)


FAR, ALONG, ASIDE = pair([[50.0, 20.0]]), pair([[1e5, 0.0]]), pair([[0.0, 1e5]])
PERSON = pair([[50.0, 0.0], [0.0, 50.0], [-50.0, 50.0]], classes=[0, 1, 2])
COPIES = pair([[50.0, 0.0]] * 4)
MEDIAN = pair([[-50.0, -20.0]], at=(4, 20))  # which one unit moves far


def test_all_before_the_noise_is_the_same_in_each_run() -> None:
    """Without this the runs below would not be those of the function."""
    with parts(noisy=exact):
        once, again, other = (fit(images).state() for images in (*[FAR[0]] * 2, FAR[1]))
    for name, values in once.items():
        np.testing.assert_array_equal(values, again[name])
    assert any(not np.array_equal(values, other[name]) for name, values in once.items()), "without one unit"


def test_what_is_kept_and_drawn_depends_on_the_images_by_the_noisy_sums_alone() -> None:
    sums = noisy_sums(
        np.ones((60, 2)), *np.array([[0, 0, 1], [0] * 3]).repeat(20, axis=1), np.arange(60), (3, 1), NOISE
    )
    with parts(noisy_sums=lambda *of_private: sums):
        one, other = (fit(images) for images in (FAR[0], PERSON[1].without(3).without(4)))
    for name, values in one.state().items():
        np.testing.assert_array_equal(values, other.state()[name], name)
    secret = bytes(32)
    for name, values in one.draw("train", secret).arrays.items():
        np.testing.assert_array_equal(values, other.draw("train", secret).arrays[name], name)
    states = [fit(FAR[0]).state() for _ in range(2)]
    differing = {name for name in states[0] if not np.array_equal(states[0][name], states[1][name])}
    assert differing == {"count", "centre", "root"}, "the control: fresh noise"


PAIRS = {"far": FAR, "along": ALONG, "aside": ASIDE, "person": PERSON, "copies": COPIES, "median": MEDIAN}


@pytest.mark.slow
@pytest.mark.parametrize("images", PAIRS.values(), ids=PAIRS.keys())
def test_runs_of_the_function_are_no_easier_told_apart_than_the_bound_says(images: Pair) -> None:
    found = lower_bound(*map(fitted, images))
    assert found <= MECHANISM.mu
    assert found > 0.8 * MECHANISM.mu, "the test comes near the bound, so that it would notice a little more"


def halved(values: Numbers, sigma: float | Numbers) -> Numbers:
    return noisy(values, sigma / 2)


def a_fifth_less(values: Numbers, sigma: float | Numbers) -> Numbers:
    return noisy(values, 0.8 * sigma)


def exact_counts(values: Numbers, sigma: float | Numbers) -> Numbers:
    return values if values.ndim == 2 and np.ndim(sigma) == 0 else noisy(values, sigma)


def of_private(images: Images, taken: Callable[[Components, Components], Components]) -> dict[str, Any]:
    """In the place of the components of Q: those that are made of them and of S's."""
    source = _rows(images.rows)

    def components(read: Any, count: int, size: int, kept: int) -> Components:
        of_private = principal_components(source.read, len(source), size, kept)
        return taken(principal_components(read, count, size, kept), of_private)

    return {"principal_components": components}


def centre_of_private(images: Images) -> dict[str, Any]:
    return of_private(images, lambda public, private: replace(public, mean=private.mean))


def components_of_private(images: Images) -> dict[str, Any]:
    return of_private(images, lambda public, private: replace(public, axes=private.axes))


def clip_of_private(images: Images) -> dict[str, Any]:
    return {"scaling": lambda variances, public: scaling(variances, images.rows)}


BROKEN: dict[str, tuple[Pair, Callable[[Images], dict[str, Any]]]] = {
    "noise halved": (FAR, lambda images: {"noisy": halved}),
    "noise a fifth less": (FAR, lambda images: {"noisy": a_fifth_less}),
    "no clip": (FAR, lambda images: {"clip": no_clip}),
    "clip taken from S": (MEDIAN, clip_of_private),
    "centre taken from S": (ALONG, centre_of_private),
    "components taken from S": (ASIDE, components_of_private),
    "a class's count exact": (FAR, lambda images: {"noisy": exact_counts}),
    "a person's rows clipped class by class": (PERSON, lambda images: {"unit_weights": by_class}),
    "each row of a person for itself": (COPIES, lambda images: {"unit_weights": ones}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BROKEN)
def test_runs_of_a_broken_function_are_told_apart_more_easily_than_the_bound_says(name: str) -> None:
    images, broken = BROKEN[name]
    seen = list[Numbers]()
    for each in images:
        with parts(**broken(each)):
            seen.append(fitted(each))
    assert lower_bound(*seen) > 1.05 * MECHANISM.mu


class Reused:
    """In the place of `noisy`: the noise of the first fit, as one drawn from a kept seed is."""

    def __init__(self) -> None:
        self.kept: dict[tuple[int, ...], Numbers] = {}

    def __call__(self, values: Numbers, sigma: float | Numbers) -> Numbers:
        if values.shape not in self.kept:
            self.kept[values.shape] = noisy(np.zeros_like(values), sigma)
        return exact(values, sigma) + self.kept[values.shape]


def twice(first: Images, second: Images, noise: Callable[[], Any]) -> Numbers:
    """What two fits release together."""
    with parts(noisy=noise()):
        return np.concatenate([fitted(first), fitted(second)], axis=1)


@pytest.mark.slow
def test_two_fits_before_and_after_a_retraction_are_told_apart_as_composition_says() -> None:
    bound = composed([MECHANISM.mu] * 2)
    there, gone = FAR
    other = there.without(7)
    retracted = lower_bound(twice(there, gone, lambda: noisy), twice(gone, gone, lambda: noisy))
    assert 0.8 * MECHANISM.mu < retracted <= MECHANISM.mu, "its unit is in one of them"
    both = lower_bound(twice(there, other, lambda: noisy), twice(gone, other.without(0), lambda: noisy))
    assert 0.8 * bound < both <= bound, "its unit is in both"
    assert lower_bound(twice(there, gone, Reused), twice(gone, gone, Reused)) > 2 * bound, "noise used again"
