"""The privacy ledger of a vault: which noisy statistics were fitted of its images, which are public, and what is left.

`privacy.json` lists a fit before what it learned is written, and never loses one: what was published is spent,
whatever is forgotten, retracted or fitted anew. Another vault of the same images is not seen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import ValidationError

from dpf_release.core.bounded_json import Record, Sha256
from dpf_release.core.privacy import Mechanism, Unit, composed, epsilon_of, gaussian_mu
from dpf_release.errors import ConfigError, RefusedError, VaultError
from dpf_release.owner.fitted import STATE, FittedFunction
from dpf_release.owner.project import Project
from dpf_release.owner.vault.ledger import releases
from dpf_release.owner.vault.vault import Vault

PRIVACY_LEDGER = "privacy.json"
ROUNDING = 1e-6  # a fit that takes all of a budget does not exceed it by how its μ was reckoned


class Fit(Record):
    """One drawing of noise: a line of the ledger.

    Attributes:
        id: digest of what was learned, as the vault keeps it.
        name: of the fitted function.
        function: what `[poison] function` said.
        mechanism: the noise.
        published: names and versions of the releases that were made of it; empty: nobody has seen it.
    """

    id: Sha256
    name: str
    function: str
    mechanism: Mechanism
    published: tuple[str, ...] = ()


@dataclass(frozen=True)
class PrivacySpent:
    """What the releases of a vault have spent of its images' privacy; each ε is for `delta`.

    Attributes:
        unit: what is protected; None where nothing was fitted with a bound.
        delta: of `[privacy]`.
        spent: ε of all published fits together.
        budget: `[privacy] epsilon`; None: not limited.
        left: ε that can be spent still; None: not limited.
        next_fit: ε of all published fits and one more like the last: what a retraction leads to. None: there is none.
        fits: all of them, the first first.
        unbounded: releases made without any bound; with one of them, no ε holds for all that is published.
    """

    unit: Unit | None
    delta: float
    spent: float
    budget: float | None
    left: float | None
    next_fit: float | None
    fits: tuple[Fit, ...]
    unbounded: tuple[str, ...]


def privacy(project: Project) -> PrivacySpent:
    """What of the images' privacy was spent by what is published, what is left, and what one more fit costs.

    Args:
        project: the owner's.

    Raises:
        VaultError: the ledger is not one of ours, or the vault does not open.

    Example:
        >>> from dpf_release import Project, privacy
        >>> privacy(Project.open("my-release/dpf.toml")).spent
        0.0
    """
    with project.vault.reading():
        section, known = project.config.privacy, fits_of(project.vault)
        mu, delta = _spent(known), section.delta
        left = None
        if section.epsilon is not None:
            left = epsilon_of(math.sqrt(max(gaussian_mu(section.epsilon, delta) ** 2 - mu**2, 0.0)), delta)
        last = known[-1].mechanism if known else None
        return PrivacySpent(
            unit=last.unit if last else None,
            delta=delta,
            spent=epsilon_of(mu, delta),
            budget=section.epsilon,
            left=left,
            next_fit=epsilon_of(composed([mu, last.mu]), delta) if last else None,
            fits=known,
            unbounded=without_bound(project.vault),
        )


def fits_of(vault: Vault) -> tuple[Fit, ...]:
    """The ledger, the first fit first; a `VaultError` where it is damaged, or lost while what it booked is public."""
    path = vault.root / PRIVACY_LEDGER
    try:
        tree = vault.read_record(path, "fit-poison") if vault.holds(path) else []
        known = tuple(Fit.model_validate(entry) for entry in tree)
    except (ValidationError, TypeError) as error:
        raise VaultError(
            f"{path} is not the ledger of what was fitted with a privacy bound: {error}. Bring it back from a copy: "
            "without it nobody knows what was spent."
        ) from error
    lost = {entry["fit"] for entry in releases(vault) if entry.get("fit")} - {fit.id for fit in known}
    if lost:
        raise VaultError(
            f"{vault.ledger} knows a release whose fit {path} does not list. Bring that back from a copy: without it "
            "nobody knows what was spent."
        )
    return known


def note_fit(vault: Vault, fit: Fit) -> None:
    """Lists a fit, unpublished; before what it learned is written."""
    known = fits_of(vault)
    if fit.id not in {one.id for one in known}:
        _write(vault, [*known, fit])


def book(vault: Vault, fit: Fit, release: str) -> None:
    """Spends a fit: notes that a release of this name and version publishes it. What is booked stays so."""
    known = fits_of(vault)
    booked = [
        one.model_copy(update={"published": (*dict.fromkeys([*one.published, release]),)}) if one.id == fit.id else one
        for one in known
    ]
    if booked != [*known]:
        _write(vault, booked)


def fit_of(vault: Vault, name: str, function: FittedFunction) -> Fit | None:
    """The fit that a function's rows are drawn from; None where it has no bound.

    A `VaultError`, where it has one and the ledger does not list it.
    """
    if function.chain.mechanism("image") is None:
        return None
    digest = vault.sha256(vault.function(name) / STATE)
    for fit in fits_of(vault):
        if fit.id == digest:
            return fit
    raise VaultError(
        f"the function {name!r} was fitted with a privacy bound, and {vault.root / PRIVACY_LEDGER} does not list the "
        f"fit. Bring the ledger back from a copy, or fit anew: `dpf-release fit-poison --name {name} --restart`."
    )


def as_published(project: Project, fit: Fit) -> Mechanism:
    """What a release of a fit says of its privacy, all but `not_covered`: with all that is published beside it."""
    published = [one for one in fits_of(project.vault) if one.published and one.id != fit.id]
    mechanism = fit.mechanism
    if other := [one for one in published if one.mechanism.unit != mechanism.unit]:
        raise RefusedError(_other_units(mechanism.unit, other[0]) + " Nothing was published.")
    together = composed(one.mechanism.mu for one in [*published, fit])
    return mechanism.model_copy(
        update={
            "fits": len(published) + 1,
            "epsilon_of_all": epsilon_of(together, mechanism.delta) if published else mechanism.epsilon,
            "networks_saw_images": project.networks_saw_images,
        }
    )


def chosen_among(vault: Vault, fit: Fit) -> int:
    """Of how many fits this one and the published ones were chosen; 0 where there are no others."""
    known = fits_of(vault)
    return 0 if all(one.published or one.id == fit.id for one in known) else len(known)


def without_bound(vault: Vault) -> tuple[str, ...]:
    """Names and versions of the releases that no bound holds for: of no fit with one, or by networks that saw S."""
    unbounded = [of for of in releases(vault) if not of.get("fit") or of.get("networks_saw_images")]
    return tuple(dict.fromkeys(f"{of['name']} {of['version']}" for of in unbounded))


def refuse_overspending(project: Project, mechanism: Mechanism | None, known: str = "", again: int = 1) -> None:
    """That what is published and a fit together keep to `[privacy]`, with one unit for all.

    Args:
        project: the owner's.
        mechanism: of the fit; None: it has no bound, and exceeds any budget.
        known: its id, where the ledger lists it: then it is counted once.
        again: how many such fits there will be.

    Raises:
        ConfigError: they exceed the budget, with all numbers, or differ in their unit.
    """
    section = project.config.privacy
    published = [fit for fit in fits_of(project.vault) if fit.published and fit.id != known]
    if mechanism and (other := [fit for fit in published if fit.mechanism.unit != mechanism.unit]):
        raise ConfigError(_other_units(mechanism.unit, other[0]))
    if section.epsilon is None:
        return
    budget = f"the budget of these images ([privacy] epsilon = {section.epsilon:g}, delta = {section.delta:g})"
    if mechanism is None:
        raise ConfigError(f"{budget} is exceeded by any function without a bound. Choose another, or take it out.")
    spent = composed(fit.mechanism.mu for fit in published)
    one = composed([mechanism.mu] * again)
    together = composed([spent, one])
    if together <= gaussian_mu(section.epsilon, section.delta) * (1 + ROUNDING):
        return
    shown = [f"{epsilon_of(mu, section.delta):.3g}" for mu in (spent, one, together)]
    raise ConfigError(
        f"{budget} would be exceeded: what is published has spent {shown[0]}, this takes {shown[1]}, together that is "
        f"{shown[2]}. Fit with a smaller epsilon, or raise the budget: earlier releases cannot be called back."
    )


def _spent(known: Sequence[Fit]) -> float:
    """The μ of all published fits together: each counts once, however many versions publish it."""
    return composed(fit.mechanism.mu for fit in known if fit.published)


def _other_units(unit: Unit, other: Fit) -> str:
    return (
        f"a bound for each {other.mechanism.unit} was published of these images ({other.published[0]}), and this one "
        f"is for each {unit}: no bound can be named for both. Set [images.private] group as it was."
    )


def _write(vault: Vault, known: Sequence[Fit]) -> None:
    vault.write_json(vault.root / PRIVACY_LEDGER, [fit.model_dump(mode="json") for fit in known])
