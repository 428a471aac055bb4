"""What was fitted under a bound is listed, what is published is spent, and neither is ever lost."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from commands import killed, run_cli
from dpf_release.core.privacy import composed, epsilon_of
from dpf_release.errors import ConfigError, RefusedError, VaultError
from dpf_release.owner.fit_poison import fit_poison
from dpf_release.owner.poison import write_candidate
from dpf_release.owner.privacy import PRIVACY_LEDGER, Fit, fits_of, privacy
from dpf_release.owner.project import Project
from dpf_release.owner.retract import retract
from dpf_release.owner.vault.sealing import forget
from dpf_release.publish import package as package_module
from dpf_release.publish.package import package


def opened(folder: Path, **overrides: Any) -> Project:
    return Project.open(folder / "dpf.toml", {key.replace("__", "."): value for key, value in overrides.items()})


def fitted_anew(folder: Path, **overrides: Any) -> Project:
    project = opened(folder, **overrides)
    fit_poison(project, restart=True)
    write_candidate(project, restart=True)
    return project


@pytest.fixture(scope="module")
def published(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project with drawn rows, with its release; nobody may change it."""
    folder = Path(shutil.copytree(drawn, tmp_path_factory.mktemp("published") / "drawn"))
    package(opened(folder))
    return folder


@pytest.fixture
def published_folder(published: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change."""
    return Path(shutil.copytree(published, tmp_path / "published"))


def epsilon_of_fits(fits: int, delta: float = 1e-4) -> float:
    """Of as many fits of ε = 4, δ = 1e-4, by the rule for Gaussian mechanisms."""
    import dp_accounting

    sigma = dp_accounting.get_sigma_gaussian(4.0, 1e-4) / math.sqrt(fits)
    return float(dp_accounting.get_epsilon_gaussian(sigma, delta))


def fits(folder: Path) -> tuple[Fit, ...]:
    return fits_of(opened(folder).vault)


# --------------------------------------------------------------------------------------------- what is listed


def test_a_fit_is_listed_when_its_statistics_are_written_and_one_without_a_bound_is_not(drawn_folder: Path) -> None:
    (fit,) = fits(drawn_folder)
    assert (fit.name, fit.function, fit.mechanism.unit) == ("default", "mixture:delta=1e-4", "image")
    assert (fit.mechanism.epsilon, fit.mechanism.delta, fit.published) == (4.0, 1e-4, ())
    fit_poison(opened(drawn_folder, poison__function="class-gaussian"), name="other")
    assert fits(drawn_folder) == (fit,)


def test_a_fit_that_is_killed_before_its_statistics_are_written_is_listed_and_so_is_the_next(
    drawn_folder: Path,
) -> None:
    killed(drawn_folder, "os.rename", "state.safetensors.partial", 1, "fit-poison", "--restart")
    assert len(fits(drawn_folder)) == 2
    assert not (drawn_folder / "vault/functions/default/state.safetensors").exists()
    fit_poison(opened(drawn_folder))  # draws fresh noise
    assert len({fit.id for fit in fits(drawn_folder)}) == 3


def test_a_fit_that_is_killed_after_its_statistics_goes_on_with_them_and_is_listed_once(drawn_folder: Path) -> None:
    killed(drawn_folder, "os.rename", "history.json.partial", 1, "fit-poison", "--restart")
    before = fits(drawn_folder)
    fit_poison(opened(drawn_folder))
    assert fits(drawn_folder) == before
    assert len(before) == 2


# --------------------------------------------------------------------------------------------- what is spent


def test_each_published_fit_is_spent_once_and_all_of_them_add_up_over_versions_and_functions(
    drawn_folder: Path,
) -> None:
    assert privacy(opened(drawn_folder)).spent == 0
    package(opened(drawn_folder))
    package(opened(drawn_folder, release__version="1.1.0"))  # the same rows once more
    spent = privacy(opened(drawn_folder, privacy__delta=1e-4))
    assert spent.spent == pytest.approx(4.0, rel=1e-4)
    assert spent.fits[0].published == ("shapes 1.0.0", "shapes 1.1.0")
    assert spent.next_fit == pytest.approx(epsilon_of_fits(2), rel=1e-4)
    project = fitted_anew(drawn_folder, release__version="2.0.0")
    manifest = package(project, second_function="Another day.")
    assert privacy(opened(drawn_folder, privacy__delta=1e-4)).spent == pytest.approx(epsilon_of_fits(2), rel=1e-4)
    assert manifest.privacy is not None
    assert (manifest.privacy.fits, manifest.privacy.epsilon) == (2, 4.0)
    assert manifest.privacy.epsilon_of_all == pytest.approx(epsilon_of_fits(2), rel=1e-4)


def test_spending_is_booked_before_the_folder_is_swapped_and_stays_where_that_fails(
    drawn_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(staging: Path, out: Path) -> None:
        assert fits(drawn_folder)[0].published == ("shapes 1.0.0",)
        raise OSError("the power went")

    assert fits(drawn_folder)[0].published == ()
    monkeypatch.setattr(package_module, "swap", fail)
    with pytest.raises(OSError, match="the power went"):
        package(opened(drawn_folder))
    assert not (drawn_folder / "release").exists()
    assert fits(drawn_folder)[0].published == ("shapes 1.0.0",)


def test_what_is_spent_survives_forgetting_fitting_anew_and_retracting(published_folder: Path) -> None:
    (spent,) = fits(published_folder)
    forget(opened(published_folder).vault)
    assert fits(published_folder) == (spent,)
    shutil.rmtree(published_folder / "vault" / "functions")
    assert fits(published_folder) == (spent,)
    assert privacy(opened(published_folder, privacy__delta=1e-4)).spent == pytest.approx(4.0, rel=1e-4)


def test_a_ledger_that_is_lost_or_damaged_is_not_taken_for_an_empty_one(published_folder: Path) -> None:
    ledger = published_folder / "vault" / PRIVACY_LEDGER
    content = ledger.read_text()
    ledger.unlink()
    with pytest.raises(VaultError, match=r"privacy\.json does not list. Bring that back"):
        privacy(opened(published_folder))
    with pytest.raises(VaultError, match="does not list"):
        package(opened(published_folder))
    ledger.write_text(content.replace('"second moment"', '"moment"'))
    with pytest.raises(VaultError, match="is not the ledger of what was fitted"):
        privacy(opened(published_folder))
    ledger.write_text(content)
    assert privacy(opened(published_folder)).spent > 0


# --------------------------------------------------------------------------------------------- the budget


def test_a_fit_within_the_budget_is_made_and_one_that_exceeds_it_is_refused_with_all_numbers(
    published_folder: Path,
) -> None:
    budget = {"privacy__epsilon": 6.0, "privacy__delta": 1e-4}
    before = (published_folder / "vault/functions/default/function.json").read_bytes()
    with pytest.raises(ConfigError, match=r"epsilon = 6, .* has spent 4, this takes 4, together that is 6\.08") as said:
        fit_poison(opened(published_folder, **budget), restart=True)
    assert "raise the budget" in str(said.value)
    assert (published_folder / "vault/functions/default/function.json").read_bytes() == before
    left = privacy(opened(published_folder, **budget)).left
    assert left is not None
    fit_poison(
        opened(published_folder, **budget, poison__function=f"mixture:delta=1e-4,epsilon={left * 0.999}"), name="b"
    )
    spec = f"mixture:delta=1e-4,epsilon={left * 1.01}"
    with pytest.raises(ConfigError, match="would be exceeded"):
        fit_poison(opened(published_folder, **budget, poison__function=spec), name="c")


def test_a_fit_that_takes_all_of_a_budget_is_within_it_and_one_without_a_bound_never_is(drawn_folder: Path) -> None:
    budget = {"privacy__epsilon": 4.0, "privacy__delta": 1e-4}
    package(opened(drawn_folder, **budget))
    assert privacy(opened(drawn_folder, **budget)).left == pytest.approx(0, abs=0.02)
    with pytest.raises(ConfigError, match="exceeded by any function without a bound"):
        fit_poison(opened(drawn_folder, **budget, poison__function="class-gaussian"), name="other")
    fit_poison(opened(drawn_folder, poison__function="class-gaussian"), name="other")  # the control: no budget


def test_of_two_fits_that_are_each_within_the_budget_only_one_is_published(drawn_folder: Path) -> None:
    budget = {"privacy__epsilon": 5.0, "privacy__delta": 1e-4}
    fit_poison(opened(drawn_folder, **budget), name="other")
    write_candidate(opened(drawn_folder), "other")
    package(opened(drawn_folder, **budget))
    with pytest.raises(ConfigError, match="would be exceeded"):
        package(opened(drawn_folder, **budget), "other", second_function="Another day.")
    package(opened(drawn_folder, release__version="2.0.0"), "other", second_function="Another day.")


def test_a_retraction_is_refused_beyond_the_budget_and_nothing_is_changed(published_folder: Path) -> None:
    ids = (published_folder / "vault/ids.csv").read_bytes()
    with pytest.raises(ConfigError, match="would be exceeded"):
        retract(opened(published_folder, privacy__epsilon=5.0, privacy__delta=1e-4), sources=["disc-portrait-003.png"])
    assert (published_folder / "vault/ids.csv").read_bytes() == ids
    assert opened(published_folder).retracted.retractions == ()


# --------------------------------------------------------------------------------------------- retracting


def test_a_retraction_fits_and_draws_again_says_before_what_that_spends_and_the_release_says_so(
    published_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = {path.name: path.read_bytes() for path in (published_folder / "release/features/train").glob("*.h5")}
    report = retract(opened(published_folder), sources=["disc-portrait-003.png"])
    said = capsys.readouterr().err
    assert "published fits have epsilon = 4, with this one they will have 6.08" in said
    assert said.index("Earlier versions stay public") < said.index("Poisoning")
    assert (report.redrawn, report.lost) == (("default",), ())
    assert [fit.published for fit in fits(published_folder)] == [("shapes 1.0.0",), ()]
    manifest = package(opened(published_folder))
    assert (manifest.version, manifest.privacy and manifest.privacy.fits) == ("1.0.1", 2)
    card = (published_folder / "release/README.md").read_text()
    assert "drawn anew" in card
    assert "1 retracted" not in card  # how many went is not covered by any bound
    after = {path.name: path.read_bytes() for path in (published_folder / "release/features/train").glob("*.h5")}
    assert not set(rows.values()) & set(after.values())


@pytest.mark.parametrize("member", ["function.json", "state.safetensors", "plan.safetensors", "candidate.json"])
def test_a_retraction_that_is_killed_on_its_way_is_finished_by_the_next(published_folder: Path, member: str) -> None:
    source = "disc/disc-portrait-003.png"
    killed(published_folder, "os.rename", f"{member}.partial", 1, "retract", "--source", source)
    retract(opened(published_folder))
    known = fits(published_folder)
    assert known[0].published
    assert not any(fit.published for fit in known[1:])
    manifest = package(opened(published_folder))
    assert (manifest.version, manifest.privacy and manifest.privacy.fits) == ("1.0.1", 2)


# --------------------------------------------------------------------------------------------- around it


def test_a_bound_for_persons_is_not_added_to_one_for_images(published_folder: Path) -> None:
    ledger = published_folder / "vault" / PRIVACY_LEDGER
    ledger.write_text(ledger.read_text().replace('"unit": "image"', '"unit": "person"'))
    with pytest.raises(ConfigError, match="a bound for each person was published of these images"):
        fit_poison(opened(published_folder), restart=True)


def test_a_function_that_needs_a_classifier_is_refused_where_that_is_trained_on_the_bank(drawn_folder: Path) -> None:
    for function in ("recombine:k=3", "dpf", "gaussian-filter+dpf"):
        with pytest.raises(ConfigError, match="needs φ2 to be fitted"):
            fit_poison(opened(drawn_folder, poison__function=function, poison__straw_men=["px2s2"]), name="other")
    for number, function in enumerate(("gaussian-noise", "class-gaussian", "gaussian-filter+class-gaussian")):
        fit_poison(opened(drawn_folder, poison__function=function), name=f"fine-{number}")


def test_the_command_shows_what_is_spent_left_and_would_be(published_folder: Path) -> None:
    config = published_folder / "dpf.toml"
    config.write_text(config.read_text() + "\n[privacy]\nepsilon = 8.0\ndelta = 1e-4\n")
    done = run_cli("privacy", folder=published_folder)
    assert done.returncode == 0, done.stderr
    shown = f"{epsilon_of_fits(2):.3g}"
    for words in (
        "together: epsilon = 4 ",
        "Budget ([privacy] epsilon): 8",
        f"epsilon = {shown} of all",
        "shapes 1.0.0",
    ):
        assert words in done.stdout
    left = privacy(opened(published_folder)).left
    assert left is not None
    assert f"Left: epsilon = {left:.3g}" in done.stdout
    mus = [fits(published_folder)[0].mechanism.mu, _mu_of(left)]
    assert epsilon_of(composed(mus), 1e-4) == pytest.approx(8.0, rel=1e-3)


def _mu_of(epsilon: float) -> float:
    from dpf_release.core.privacy import gaussian_mu

    return gaussian_mu(epsilon, 1e-4)


def test_without_report_is_refused_where_no_bound_is_there(project_folder: Path) -> None:
    with pytest.raises(RefusedError, match="expected a function with a privacy bound"):
        package(opened(project_folder), without_report=True)
    assert privacy(opened(project_folder)).unbounded == ("shapes 1.0.0",)
    assert json.loads((project_folder / "vault/ledger.json").read_text())[0].get("fit") is None


def test_groups_that_cannot_pass_the_gate_are_refused_before_anything_is_fitted(drawn_folder: Path) -> None:
    claimed = {"claims__linkage": True, "poison__function": "mixture:epsilon=inf,groups=11"}
    with pytest.raises(ConfigError, match=r"5\.5% of cases on average.*at most 10 groups"):
        fit_poison(opened(drawn_folder, **claimed), name="groups")
    allowed = (claimed | {"poison__function": "mixture:epsilon=inf,groups=10"}, claimed | {"claims__linkage": False})
    for number, options in enumerate(allowed):  # the control: these go on, to find too few images
        with pytest.raises(ConfigError, match="expected 50 images of each class"):
            fit_poison(opened(drawn_folder, **options), name=f"groups-{number}")
