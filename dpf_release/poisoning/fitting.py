"""Where poisoning functions are fitted: by `fit-poison` on S; by the shadow attacker and the public page on Q.

Stage by stage: a stage is fitted on the rows as those before it leave them, then planned for each split.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dpf_release.poisoning.chain import Chain
from dpf_release.poisoning.context import FitContext, FitRows, Material, Split
from dpf_release.poisoning.plan import Plan

Plans = dict[str, list[Plan]]  # of each split, one a stage


def fit_chain(
    chain: Chain,
    material: Material,
    known: Mapping[str, list[Plan]] | None = None,
    planned: Callable[[Plans], Plans] = lambda plans: plans,
) -> tuple[Plans, dict[str, float], dict[str, Any]]:
    """Fits and plans each stage in turn.

    Args:
        chain: whose networks were drawn from secret randomness.
        material: what it is fitted from.
        known: plans of the first stages, of a run that was cut off.
        planned: told of all plans so far, after each stage; says which count (of several ranks, the first's).

    Returns:
        The plans of `train` and `val`; what the last stage that learned anything says; the histories of all trainings.

    Raises:
        ConfigError: a function that cannot be fitted on these rows; it says why.
    """
    splits = {"train": material.train, "val": material.val}
    plans: Plans = {name: list((known or {}).get(name, [])) for name in splits}
    facts: dict[str, float] = {}
    histories: dict[str, Any] = {}
    for network in chain.networks():
        network.to(material.device)
    for number, stage in enumerate(chain.stages):
        train, val = (_fit_rows(chain, split, plans[name], number) for name, split in splits.items())
        context = FitContext(material, number, train, val, chain.stage_secret(material.secret, number))
        facts = stage.fit(context) or facts
        histories |= context.histories
        for network in stage.networks():
            network.eval().requires_grad_(False)
        for name, rows in (("train", train), ("val", val)):
            if len(plans[name]) == number:
                plans[name].append(stage.plan(rows.inputs, material.phi_2, context.secret))
        plans = planned(plans)
    return plans, facts, histories


def _fit_rows(chain: Chain, split: Split, plans: list[Plan], stages: int) -> FitRows:
    mixing = chain.mixing_stages(stages)
    inputs = chain.on(split.rows, plans, stages)
    return FitRows(
        inputs,
        inputs if mixing == stages else chain.on(split.rows, plans, mixing),
        lambda rows: chain.contributors(rows, plans, stages),
        split.images,
    )
