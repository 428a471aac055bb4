"""A function is one class: what it declares, learns and keeps is all that the tool knows of it."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import EntryPoint
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from commands import run_cli
from dpf_release.bank.rows import RowSource
from dpf_release.core.parameters import Parameter, parse_parameters
from dpf_release.errors import ConfigError
from dpf_release.models.training import Recipe
from dpf_release.poisoning import chain as chain_module
from dpf_release.poisoning.chain import build_chain, fit_chain, known_functions
from dpf_release.poisoning.context import FitContext, FitRows, Material, Split
from dpf_release.poisoning.interface import FUNCTIONS, PoisoningFunction, State, register
from dpf_release.poisoning.objective import Adversaries, Objective, PoisonBatch, TaskLoss
from dpf_release.poisoning.plan import Contributors, FeatureSpec, Plan
from rows_in_memory import SECRET, Rows, rows_of

SHAPE = (2, 4, 4)


class TwoStages(PoisoningFunction):
    """Learns a deviation, then a network behind it, and a number."""

    learned_secret = True
    parameters = (Parameter("by", 2.0, 0.5, 4.0, "what the deviation is multiplied by"),)
    by: float

    def __init__(self, features: FeatureSpec, **values: float) -> None:
        super().__init__(features, **values)
        self.network = nn.Conv2d(features.shape[0], features.shape[0], 1)
        self.spread, self.seen = torch.zeros(()), 0

    def fit(self, context: FitContext) -> dict[str, float]:
        self.seen = len(context.train)
        self.spread = self.by * torch.from_numpy(context.train.inputs.read(np.arange(self.seen))).std()

        def loss(network: nn.Module, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
            return {"loss": (network(batch[0]) - self.spread).square().mean()}

        return context.fit(self.network, loss, name="flat", epochs=2)

    def state(self) -> State:
        return {"spread": self.spread, "seen": self.seen, **{f"w.{k}": v for k, v in self.network.state_dict().items()}}

    def load(self, state: Mapping[str, Tensor]) -> None:
        self.spread, self.seen = state["spread"], int(state["seen"])
        self.network.load_state_dict({k.removeprefix("w."): v for k, v in state.items() if k.startswith("w.")})

    def apply(self, rows: np.ndarray, source: RowSource, plan: Plan) -> NDArray[np.float32]:
        with torch.inference_mode():
            found: NDArray[np.float32] = self.network(torch.from_numpy(source.read(rows))).numpy()
        return found


def material(train: Rows, val: Rows) -> Material:
    def images(rows: np.ndarray) -> Tensor:
        return torch.zeros(len(rows), 3, 16, 16, dtype=torch.uint8)

    return Material(
        features=FeatureSpec(SHAPE, True),
        phi_1=nn.Identity(),
        phi_2=nn.Flatten(),
        task=TaskLoss(),
        train=Split(train, images),
        val=Split(val, images),
        public=None,
        adversaries=Adversaries,
        objective="equivalence",
        lambda_=1.0,
        recipe=Recipe(1, 4, 0.01, bf16="off"),
        secret=SECRET,
        device=torch.device("cpu"),
    )


@pytest.fixture
def two_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FUNCTIONS, "two-stages", TwoStages)
    monkeypatch.setattr(TwoStages, "name", "two-stages")


@pytest.mark.usefixtures("two_stages")
def test_a_stage_learns_from_the_rows_that_the_stages_before_leave_it() -> None:
    train, val = rows_of(np.zeros(12), SHAPE), rows_of(np.zeros(4), SHAPE, seed=1)
    chain = build_chain("mean-filter+two-stages:by=4", FeatureSpec(SHAPE, True))
    plans, facts, histories = fit_chain(chain, material(train, val))
    blurred = chain.on(train, plans["train"], 1).read(np.arange(12))
    learned = chain.stages[1]
    assert isinstance(learned, TwoStages)
    assert float(learned.spread) == pytest.approx(4 * blurred.std(ddof=1), rel=1e-4)
    assert abs(float(learned.spread) - 4 * train.features.std()) > 0.1  # the control: not of the clean rows
    assert facts["loss"] > 0
    assert list(histories) == ["1-flat"]
    assert len(histories["1-flat"]["epochs"]) == 2
    assert [len(of) for of in plans.values()] == [2, 2]
    assert not any(parameter.requires_grad for parameter in learned.network.parameters())


@pytest.mark.usefixtures("two_stages")
def test_what_was_learned_comes_back_from_its_state_numbers_too() -> None:
    train, val = rows_of(np.zeros(12), SHAPE), rows_of(np.zeros(4), SHAPE, seed=1)
    fitted, again, other = (build_chain("identity+two-stages", FeatureSpec(SHAPE, True)) for _ in range(3))
    plans, _, _ = fit_chain(fitted, material(train, val))
    assert {name.split("/")[0] for name in fitted.state()} == {"1"}  # the stage's number
    again.load(fitted.state())
    rows = [chain.on(train, plans["train"]).read(np.arange(5)) for chain in (fitted, again, other)]
    assert np.allclose(rows[0], rows[1], atol=1e-6)
    assert not np.allclose(rows[0], rows[2], atol=1e-3)
    assert again.stages[1].seen == 12  # type: ignore[attr-defined]


def test_stages_that_were_planned_before_a_run_was_cut_off_are_not_planned_again() -> None:
    train, val = rows_of(np.repeat([0, 1], 6), SHAPE), rows_of(np.repeat([0, 1], 3), SHAPE, seed=1)
    chain = build_chain("recombine:k=3+gaussian-noise", FeatureSpec(SHAPE, True))
    whole, _, _ = fit_chain(chain, material(train, val))
    marked = {name: [Plan(of[0].secret, of[0].arrays | {"mark": np.ones(1)})] for name, of in whole.items()}
    resumed, _, _ = fit_chain(chain, material(train, val), marked)
    assert all("mark" in of[0].arrays for of in resumed.values())
    assert all("mark" not in of[0].arrays for of in whole.values())
    assert [plan.secret for plan in resumed["train"]] == [plan.secret for plan in whole["train"]]


@torch.inference_mode()
def test_a_row_of_nobody_costs_the_objective_nothing_but_its_answer() -> None:
    adversaries = Adversaries(
        {"psi": nn.Sequential(nn.Flatten(), nn.Linear(32, 3 * 256), nn.Unflatten(1, (3, 16, 16)))}
    )
    objective = Objective(nn.Flatten(), TaskLoss(), adversaries, True, 1.0)
    features, targets = torch.rand(4, *SHAPE), torch.zeros(4, dtype=torch.int64)
    images = torch.randint(0, 255, (4, 3, 16, 16), dtype=torch.uint8)
    nobody = torch.empty(0, dtype=torch.int64)
    found = objective(nn.Identity(), PoisonBatch(features, features, targets, nobody, images[:0]))
    assert float(found["loss"]) == float(found["ssim psi"]) == 0
    themselves = objective(nn.Identity(), PoisonBatch(features, features, targets, torch.arange(4), images))
    assert float(themselves["ssim psi"]) != 0


def test_rows_of_nobody_pass_through_a_chain_as_nobodys(monkeypatch: pytest.MonkeyPatch) -> None:
    class Drawn(PoisoningFunction):
        def apply(self, rows: np.ndarray, source: RowSource, plan: Plan) -> NDArray[np.float32]:
            return np.zeros((len(rows), *self.features.shape), np.float32)

        def contributors(self, rows: np.ndarray, plan: Plan) -> Contributors:
            return Contributors.nobody()

    monkeypatch.setitem(FUNCTIONS, "drawn", Drawn)
    source, rows = rows_of(np.repeat([0, 1], 6), SHAPE), np.arange(5)
    for spec, count in (("recombine:k=3+drawn", 0), ("drawn+mean-filter", 0), ("mean-filter", 5)):
        chain = build_chain(spec, FeatureSpec(SHAPE, True))
        plans = chain.plan(source, nn.Flatten(), SECRET)
        assert len(chain.contributors(rows, plans).positions) == count
        assert chain.contributors(rows, plans).foremost(rows).tolist() == rows.tolist()


@pytest.mark.parametrize("before", ["gaussian-noise", "mean-filter"])
def test_a_stage_that_leaves_rows_their_images_leaves_their_pieces_too(before: str) -> None:
    source, rows = rows_of(np.repeat([0, 1], 10), (2, 8, 8)), np.arange(20)
    alone, behind = (
        build_chain(spec, FeatureSpec((2, 8, 8), True)) for spec in ("recombine:k=4", f"{before}+recombine:k=4")
    )
    plans = behind.plan(source, nn.Flatten(), SECRET)
    found, wanted = behind.contributors(rows, plans), alone.contributors(rows, plans[1:])
    assert all(np.array_equal(one, two) for one, two in zip(found, wanted, strict=True))
    assert found.pieces.max() > 1
    assert (found.foremost(rows) != rows).any()


def test_each_training_of_a_stage_has_a_name_of_its_own() -> None:
    train = rows_of(np.zeros(8), SHAPE)
    context = FitContext(material(train, train), 0, *(fit_rows(train) for _ in range(2)), SECRET)

    def loss(network: nn.Module, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        return {"loss": network(batch[0]).square().mean()}

    context.fit(nn.Conv2d(2, 2, 1), loss, name="a")
    context.fit(nn.Conv2d(2, 2, 1), loss, name="b")
    for name in ("a", "a/b", "a b"):
        with pytest.raises(ConfigError, match="another each time"):
            context.fit(nn.Conv2d(2, 2, 1), loss, name=name)


def fit_rows(rows: Rows) -> FitRows:
    return FitRows(rows, rows, Contributors.themselves, lambda members: torch.zeros(len(members), 3, 16, 16).byte())


# --------------------------------------------------------------------------------------------- parameters


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_every_function_declares_its_parameters_within_their_bounds_and_says_what_its_rows_are(name: str) -> None:
    cls = FUNCTIONS[name]
    function = cls(FeatureSpec((4, 8, 8), True))
    for parameter in cls.parameters:
        assert parameter.low <= parameter.default <= parameter.high
        assert getattr(function, parameter.name) == parameter.default
        assert parameter.help
        for beyond in (parameter.low - 1, parameter.high * 2 + 1):
            if beyond < float("inf"):  # above no bound there is nothing
                with pytest.raises(ConfigError, match=f"{name}:{parameter.name}"):
                    cls(FeatureSpec((4, 8, 8), True), **{parameter.name: beyond})
    assert function.statement().startswith("Each row ")
    with pytest.raises(ConfigError, match="'nonsense'"):
        cls(FeatureSpec((4, 8, 8), True), nonsense=1)


def test_parameters_vary_within_their_bounds_and_keep_their_type() -> None:
    whole, broken = Parameter("k", 5, 4, 6, ""), Parameter("sigma", 1.0, 0.9, 9.0, "")
    drawn = [
        (whole.vary(5, generator), broken.vary(1.0, generator)) for generator in map(np.random.default_rng, range(50))
    ]
    assert {k for k, _ in drawn} == {4, 5, 6}
    assert all(0.9 <= sigma <= 2 for _, sigma in drawn)
    assert len({sigma for _, sigma in drawn}) > 10
    chain = build_chain("recombine:k=20+gaussian-filter", FeatureSpec(SHAPE, True))
    others = {chain.varied(np.random.default_rng(seed)) for seed in range(8)}
    assert len(others) > 1
    for other in others:
        assert [stage.name for stage in build_chain(other, FeatureSpec(SHAPE, True)).stages] == [
            "recombine",
            "gaussian-filter",
        ]


def test_parameters_are_parsed_by_what_is_declared() -> None:
    declared = (Parameter("k", 5, 2, 9, ""), Parameter("sigma", 1.0, 0.0, 9.0, ""))
    assert parse_parameters("f", "k=3,sigma=2", declared) == {"k": 3, "sigma": 2.0}
    assert parse_parameters("f", "", declared) == {}
    for text, words in (
        ("k=1", "from 2 to 9"),
        ("k=2.5", "whole number"),
        ("z=1", "'z'"),
        ("k=x", "a number"),
        ("k", "as in"),
    ):
        with pytest.raises(ConfigError, match=words):
            parse_parameters("f", text, declared)


def test_the_command_lists_all_functions_with_their_parameters(tmp_path: Any) -> None:
    done = run_cli("functions", folder=tmp_path)
    assert done.returncode == 0
    assert all(name in done.stdout for name in FUNCTIONS)
    assert "taps of the Gaussian, an odd number" in done.stdout


# --------------------------------------------------------------------------------------------- from outside


def test_an_installed_package_names_functions_by_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint("another-identity", "dpf_release.poisoning.stationary:Identity", chain_module.ENTRY_POINTS)
    with pytest.raises(ConfigError, match="'another-identity'"):
        build_chain("another-identity", FeatureSpec(SHAPE, True))
    monkeypatch.setattr(chain_module, "installed", lambda group: {entry.name: entry})
    assert type(build_chain("another-identity", FeatureSpec(SHAPE, True)).stages[0]) is FUNCTIONS["identity"]
    assert "another-identity" in known_functions(trust_code=True)
    assert "another-identity" not in known_functions()
    with pytest.raises(ConfigError, match="--trust-code"):
        build_chain("another-identity", FeatureSpec(SHAPE, True), allow_import=False)
    with pytest.raises(ConfigError, match="one of another-identity, class-gaussian"):
        build_chain("nothing", FeatureSpec(SHAPE, True))


def test_no_function_takes_the_name_of_another() -> None:
    with pytest.raises(ConfigError, match="DeepPoisoningFunction is called 'dpf' already"):
        register("dpf")(TwoStages)
    assert FUNCTIONS["dpf"] is not TwoStages
