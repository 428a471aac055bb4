"""What (ε, δ) means: noise, composition, what an attacker can reach, and noise that tells nothing by its low bits."""

from __future__ import annotations

import math
import os
import warnings

import dp_accounting
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from opacus.accountants import PRVAccountant
from opacus.accountants.analysis.gdp import eps_from_mu
from pydantic import ValidationError
from scipy.special import ndtr, ndtri
from scipy.stats import kstest

from dpf_release.core import privacy
from dpf_release.core.privacy import (
    GRID,
    ROUNDING,
    Mechanism,
    composed,
    epsilon_of,
    gaussian_mu,
    highest_auc,
    highest_tpr,
    noisy,
)

SHARES = (0.1, 0.3, 0.6)
DELTA = 1e-5


def delta_of(epsilon: float, mu: float) -> float:
    """Balle and Wang 2018, theorem 8."""
    return float(ndtr(mu / 2 - epsilon / mu) - math.exp(epsilon) * ndtr(-mu / 2 - epsilon / mu))


def opacus_epsilon(mus: list[float], delta: float = DELTA) -> float:
    """Of full-batch Gaussian mechanisms one after another, by the numerical composition of Gopi et al. 2021."""
    accountant = PRVAccountant()
    for mu in mus:
        accountant.step(noise_multiplier=1 / mu, sample_rate=1.0)
    with np.errstate(divide="ignore"), warnings.catch_warnings():  # it takes the logarithm of 1 - sample rate
        warnings.simplefilter("ignore", UserWarning)  # of a first guess that need not be tight
        return float(accountant.get_epsilon(delta, eps_error=0.01))


@pytest.mark.parametrize("epsilon", [0.01, 0.5, 1.0, 2.0, 4.0, 8.0, 20.0])
@pytest.mark.parametrize("delta", [1e-5, 1e-8])
def test_noise_is_calibrated_as_the_closed_formula_and_a_second_library_say(epsilon: float, delta: float) -> None:
    mu = Mechanism.calibrated(epsilon, delta, SHARES, "image").mu
    assert delta_of(epsilon, mu) == pytest.approx(delta, rel=1e-5)
    assert eps_from_mu(mu=mu, delta=delta) == pytest.approx(epsilon, rel=1e-5)
    assert delta_of(epsilon, 1.01 * mu) > delta * 1.005, "a little less noise is not private enough"


@pytest.mark.parametrize("epsilon", [1.0, 4.0, 8.0])
def test_noise_is_calibrated_as_a_numerical_accountant_says(epsilon: float) -> None:
    mechanism = Mechanism.calibrated(epsilon, DELTA, SHARES, "image")
    statistics = [1 / sigma for sigma in mechanism.noise.values()]
    assert opacus_epsilon([mechanism.mu]) == pytest.approx(epsilon, abs=0.03)
    assert opacus_epsilon(statistics) == pytest.approx(epsilon, abs=0.03), "three statistics, composed"
    assert opacus_epsilon([2 * mu for mu in statistics]) > 1.5 * epsilon, "half the noise"


@pytest.mark.parametrize(
    ("epsilon", "mu", "auc", "tpr"),
    [(1, 0.27, 0.575, 0.020), (2, 0.50, 0.639, 0.034), (4, 0.93, 0.743, 0.081), (8, 1.67, 0.881, 0.255)],
)
def test_what_an_attacker_can_reach_is_what_the_claims_say(epsilon: float, mu: float, auc: float, tpr: float) -> None:
    found = gaussian_mu(epsilon, DELTA)
    assert found == pytest.approx(mu, abs=0.006)
    assert highest_auc(found) == pytest.approx(auc, abs=0.001)
    assert highest_tpr(found, 0.01) == pytest.approx(tpr, abs=0.001)
    assert highest_auc(0) == 0.5
    assert highest_tpr(0, 0.01) == pytest.approx(0.01)


def test_what_an_attacker_can_reach_is_what_the_best_one_finds() -> None:
    draw = np.random.default_rng(0)
    mu, others, members = gaussian_mu(4, DELTA), draw.standard_normal(10**6), draw.standard_normal(10**6)
    members += mu
    assert (members > others).mean() == pytest.approx(highest_auc(mu), abs=0.003)
    assert (members > np.quantile(others, 0.99)).mean() == pytest.approx(highest_tpr(mu, 0.01), abs=0.003)


@given(st.floats(0.01, 50), st.floats(1e-12, 1e-3))
def test_epsilon_follows_from_mu_and_mu_from_epsilon(epsilon: float, delta: float) -> None:
    assert epsilon_of(gaussian_mu(epsilon, delta), delta) == pytest.approx(epsilon, rel=1e-4, abs=1e-6)


def test_several_fits_compose_as_a_second_library_says() -> None:
    first, second = gaussian_mu(4, DELTA), gaussian_mu(2, DELTA)
    both = epsilon_of(composed([first, second]), DELTA)
    assert composed([first, second]) == pytest.approx(math.hypot(first, second))
    assert both == pytest.approx(opacus_epsilon([first, second]), abs=0.03)
    assert 4 < both < 6, "less than the sum of both, more than either"
    assert epsilon_of(composed([first] * 3), DELTA) == pytest.approx(opacus_epsilon([first] * 3), abs=0.05)
    assert composed([]) == epsilon_of(0, DELTA) == 0


@pytest.mark.parametrize("epsilon", [1.0, 4.0])
def test_three_lines_compute_epsilon_from_the_public_numbers(epsilon: float) -> None:
    public = Mechanism.calibrated(epsilon, DELTA, SHARES, "person").model_dump(mode="json")

    sigmas = public["noise"].values()
    mu = math.sqrt(sum((public["sensitivity"] / sigma) ** 2 for sigma in sigmas))
    found = dp_accounting.get_epsilon_gaussian(1 / mu, public["delta"])

    assert found == pytest.approx(public["epsilon"], rel=1e-3)
    assert found <= public["epsilon"], "what rounding costs is in the noise"
    exact = epsilon_of(Mechanism.model_validate(public).mu, DELTA)
    assert exact == pytest.approx(epsilon, rel=1e-6)
    sigmas = [sigma / 2 for sigma in sigmas]
    assert epsilon_of(composed(1 / sigma for sigma in sigmas), DELTA) > 1.9 * epsilon, "half the noise is noticed"


@pytest.mark.parametrize("shares", [SHARES, (0.05, 0.6, 0.35), (1 / 3, 1 / 3, 1 / 3)])
def test_shares_divide_the_budget_and_change_nothing_of_it(shares: tuple[float, float, float]) -> None:
    mechanism = Mechanism.calibrated(4, DELTA, shares, "image")
    mus = np.array([(1 + ROUNDING) / sigma for sigma in mechanism.noise.values()])
    np.testing.assert_allclose(mus**2 / (mus**2).sum(), shares)
    assert mechanism.mu == pytest.approx(gaussian_mu(4, DELTA))


def test_a_mechanism_without_the_noise_of_one_statistic_is_refused() -> None:
    public = Mechanism.calibrated(4, DELTA, SHARES, "image").model_dump(mode="json")
    Mechanism.model_validate(public)
    del public["noise"]["second moment"]  # from what is left follows a smaller epsilon than was spent
    with pytest.raises(ValidationError, match="second moment"):
        Mechanism.model_validate(public)


# ------------------------------------------------------------------------------------------------ noise


def test_noise_is_gaussian_of_the_deviation_asked_for() -> None:
    values = np.full(200_000, 3.0)
    noise = (noisy(values, 2.5) - values) / 2.5
    assert kstest(noise, "norm").pvalue > 1e-6
    assert kstest(noise * 1.02, "norm").pvalue < 1e-3, "the test sees two percent"
    deviations = np.array([[0.5], [4.0]])
    both = noisy(np.zeros((2, 100_000)), deviations) / deviations
    np.testing.assert_allclose(both.std(1), 1, rtol=0.02)
    assert abs(np.corrcoef(both)[0, 1]) < 0.02


def test_noise_is_drawn_afresh_each_time_and_follows_no_seed() -> None:
    def once() -> np.ndarray:
        np.random.seed(0)  # noqa: NPY002
        return noisy(np.zeros(1000), 1.0)

    assert not np.isin(once(), once()).any()


@given(st.lists(st.floats(-1e5, 1e5), min_size=1, max_size=20), st.floats(0.1, 1e3))
def test_what_is_noisy_lies_on_the_grid(values: list[float], sigma: float) -> None:
    found = noisy(np.array(values), sigma) / GRID
    np.testing.assert_array_equal(found, np.round(found))


def test_low_bits_of_what_is_noisy_say_nothing_of_the_value() -> None:
    """Mironov 2012: which of two values noise was added to in floating point shows in the sum's last bits."""
    values, other = np.full(50_000, 1 / 3), np.full(50_000, 1 / 3 + 2**-40)

    def low_bits(sums: np.ndarray) -> np.ndarray:
        return np.round(sums / 2.0**-48) % 2**18  # below the grid

    draw = np.random.default_rng(0)
    naive = [low_bits(each + 2.0**-30 * np.round(draw.normal(size=each.size) / 2.0**-30)) for each in (values, other)]
    assert not np.isin(*naive).any(), "the control: the value can be read below the grid of the noise"
    ours = [low_bits(noisy(each, 1.0)) for each in (values, other)]
    assert not ours[0].any()
    assert not ours[1].any()


@pytest.mark.parametrize("value", [0.0, 1 / 3, 5.0])
def test_lowest_bits_on_the_grid_are_alike_whatever_the_value(value: float) -> None:
    numbers = np.round(noisy(np.full(100_000, value), 3.0) / GRID).astype(np.int64)
    for bit in range(8):
        assert (numbers >> bit & 1).mean() == pytest.approx(0.5, abs=0.01)


def _extreme(monkeypatch: pytest.MonkeyPatch, byte: bytes, size: int) -> np.ndarray:
    """Noise whose first half is the most extreme that it can be."""
    real = os.urandom
    with monkeypatch.context() as patched:
        patched.setattr(privacy.os, "urandom", lambda count: byte * (count // 2) + real(count - count // 2))
        return noisy(np.zeros(size), 1.0)


def test_the_tail_of_the_noise_is_as_dense_as_the_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the one number in a million that lies there says which value cannot have been below it."""
    low, high = _extreme(monkeypatch, b"\0", 20_000), _extreme(monkeypatch, b"\xff", 20_000)
    assert np.isfinite(low).all()
    assert np.isfinite(high).all()
    assert low.mean() == pytest.approx(-high.mean(), abs=0.05)
    assert -low.mean() > 5
    for tail in (low, high):
        assert len(np.unique(tail)) > 19_990
        assert (np.round(tail / GRID) % 2).mean() == pytest.approx(0.5, abs=0.03)
    single = np.unique(np.round(ndtri((np.arange(1000) + 0.5) * 2.0**-53) / GRID))
    assert np.diff(single).min() > 10_000, "the control: one number of 53 bits leaves gaps"
