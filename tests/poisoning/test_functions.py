"""Poisoning functions do what their names say, to the pixel, and a plan decides all that is random."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import nn

from dpf_release.errors import ConfigError
from dpf_release.poisoning.chain import build_chain
from dpf_release.poisoning.deep import DeepPoisoningFunction
from dpf_release.poisoning.interface import FUNCTIONS, PoisonedRows, PoisoningFunction, register
from dpf_release.poisoning.plan import Contributors, FeatureSpec, Plan
from rows_in_memory import SECRET, Pooled, Recorder, planned, poisoned, rows_of

OTHER_SECRET = bytes([1] * 32)
SHAPES = [(3, 8, 8), (5, 7, 3), (1, 5, 5)]


# --------------------------------------------------------------------------------------------- dpf


def dpf(shape: tuple[int, int, int], non_negative: bool, **settings: int) -> nn.Module:
    return DeepPoisoningFunction(FeatureSpec(shape, non_negative), **settings).network


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("non_negative", [True, False])
def test_dpf_starts_as_the_identity(shape: tuple[int, int, int], training: bool, non_negative: bool) -> None:
    network = dpf(shape, non_negative).train(training)
    features = torch.randn(6, *shape)
    if non_negative:
        features.relu_()
    assert torch.equal(network(features), features)
    nn.init.ones_(network[0].residual[-1].weight)
    assert network(features).shape == features.shape
    assert not torch.equal(network(features), features)


def test_dpf_keeps_negative_features_only_where_the_featurizer_has_them() -> None:
    features = torch.randn(4, 3, 5, 5)
    assert torch.equal(dpf(features.shape[1:], False)(features), features)
    assert torch.equal(dpf(features.shape[1:], True)(features), features.relu())
    assert not torch.equal(features, features.relu())


@pytest.mark.parametrize(("spec", "blocks", "width"), [("dpf", 4, 16), ("dpf:depth=2,width=5", 2, 5)])
def test_dpf_has_the_depth_and_width_asked_for(spec: str, blocks: int, width: int) -> None:
    network = build_chain(spec, FeatureSpec((8, 4, 4), True)).networks()[0]
    inner = [module for module in network.modules() if getattr(module, "kernel_size", None) == (3, 3)]
    assert [module.out_channels for module in inner] == [width] * blocks


def test_dpf_is_applied_as_fitted_whatever_else_is_in_the_batch() -> None:
    source = rows_of(np.zeros(6))
    chain, plans = planned("dpf:depth=1", source)
    nn.init.ones_(chain.networks()[0][0].residual[-1].weight)
    chain.networks()[0].train()
    alone, together = (chain.on(source, plans).read(np.arange(count)) for count in (1, 6))
    np.testing.assert_allclose(alone[0], together[0], atol=1e-6)
    mixed = chain.networks()[0].train()(torch.from_numpy(source.features)).detach().numpy()
    assert np.abs(mixed[0] - alone[0]).max() > 1e-3


# --------------------------------------------------------------------------------------------- stationary


def test_a_row_keeps_its_noise_when_others_go_or_move() -> None:
    source = rows_of(np.zeros(5))
    noised, kept = poisoned("gaussian-noise", source), [3, 0, 4]
    assert np.array_equal(poisoned("gaussian-noise", source[kept]), noised[kept])
    assert not np.allclose(noised, source.features, atol=0.1)


def test_noise_is_another_for_another_secret_and_another_id() -> None:
    source = rows_of(np.zeros(5))
    noised, other_secret = (
        poisoned("gaussian-noise", source),
        poisoned("gaussian-noise", source, OTHER_SECRET),
    )
    other_ids = poisoned("gaussian-noise", replace(source, ids=source.ids[::-1]))
    assert np.array_equal(noised, poisoned("gaussian-noise", source))
    for other in (other_secret, other_ids[[0, 1, 3, 4]]):
        assert (np.abs(other - noised[: len(other)]).max(axis=(1, 2, 3)) > 0.1).all()
    assert np.array_equal(other_ids[2], noised[2])  # the middle id stays in its place


def test_noise_has_the_scale_asked_for_in_deviations_of_its_row() -> None:
    source = rows_of(np.zeros(2), (8, 32, 32))
    source.features[1] *= 10
    for scale in (0.5, 2.0):
        noise = poisoned(f"gaussian-noise:scale={scale}", source) - source.features
        relative = noise.std(axis=(1, 2, 3)) / source.features.std(axis=(1, 2, 3))
        assert relative == pytest.approx([scale] * 2, rel=0.03)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("sigma", "size"), [(1.0, 5), (0.5, 3), (2.0, 5)])
def test_gaussian_filter_is_a_truncated_gaussian_with_mirrored_borders(
    shape: tuple[int, int, int], sigma: float, size: int
) -> None:
    source = rows_of(np.zeros(3), shape)
    wanted = gaussian_filter(source.features, (0, 0, sigma, sigma), mode="mirror", radius=(0, 0, size // 2, size // 2))
    blurred = poisoned(f"gaussian-filter:sigma={sigma},size={size}", source)
    np.testing.assert_allclose(blurred, wanted, atol=1e-6)
    assert np.abs(blurred - source.features).max() > 0.05


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [1, 3, 5])
def test_mean_filter_averages_what_of_its_window_lies_inside(shape: tuple[int, int, int], size: int) -> None:
    source, reach = rows_of(np.zeros(2), shape), size // 2
    wanted = np.empty_like(source.features)
    for y, x in np.ndindex(shape[1:]):
        window = (slice(max(0, y - reach), y + reach + 1), slice(max(0, x - reach), x + reach + 1))
        wanted[:, :, y, x] = source.features[:, :, *window].mean(axis=(2, 3))
    np.testing.assert_allclose(poisoned(f"mean-filter:size={size}", source), wanted, atol=1e-6)
    assert (size > 1) == (np.abs(wanted - source.features).max() > 0.05)


@pytest.mark.parametrize("spec", ["gaussian-filter", "mean-filter"])
def test_filters_leave_a_constant_as_it_is(spec: str) -> None:
    source = rows_of(np.zeros(2), (2, 6, 6))
    source.features[0] = 3
    filtered = poisoned(spec, source)
    np.testing.assert_allclose(filtered[0], source.features[0], atol=1e-6)
    assert np.abs(filtered[1] - source.features[1]).max() > 0.05


def test_only_a_chain_of_identities_does_not_poison() -> None:
    source = rows_of(np.zeros(3))
    assert np.array_equal(poisoned("identity", source), source.features)
    poisons = {
        spec: build_chain(spec, FeatureSpec((3, 4, 4), True)).poisons
        for spec in ("identity", "identity+identity", "identity+dpf", "mean-filter+identity")
    }
    assert list(poisons.values()) == [False, False, True, True]


# --------------------------------------------------------------------------------------------- recombine


def groups_of(plan: Plan) -> list[set[int]]:
    numbers = plan.arrays["group"]
    return [set(np.flatnonzero(numbers == number).tolist()) for number in np.unique(numbers)]


@pytest.mark.parametrize(("counts", "k"), [((23, 10, 14), 5), ((6, 7), 3), ((9, 5), 5), ((40,), 2)])
def test_groups_are_a_partition_of_each_class_into_k_or_more(counts: tuple[int, ...], k: int) -> None:
    source = rows_of(np.random.default_rng(1).permutation(np.repeat(np.arange(len(counts)), counts)))
    _, (plan,) = planned(f"recombine:k={k}", source)
    groups = groups_of(plan)
    assert sum(map(len, groups)) == len(source)
    assert all(k <= len(group) < 2 * k for group in groups)
    assert all(len({int(source.targets[row]) for row in group}) == 1 for group in groups)
    assert len(groups) == sum(count // k for count in counts)


@pytest.mark.parametrize(
    ("shape", "patch"),
    [((3, 4, 4), 2), ((2, 5, 7), 1), ((2, 5, 7), 2), ((1, 3, 3), 2), ((1, 3, 4), 3), ((2, 1, 1), 1)],
)
def test_each_window_of_a_row_comes_whole_from_a_member_of_its_group(shape: tuple[int, int, int], patch: int) -> None:
    source = rows_of(np.repeat([0, 1], 6), shape)
    chain, (plan,) = planned(f"recombine:k=3,patch={patch}", source)
    rows = np.array([7, 2, 11, 2])
    recombined = chain.on(source, [plan]).read(rows)
    across = -(-shape[2] // patch)
    for position, row in enumerate(rows):
        group = np.flatnonzero(plan.arrays["group"] == plan.arrays["group"][row])
        assert np.isin(plan.arrays["pieces"][row], group).all()
        for y, x in np.ndindex(shape[1:]):
            member = plan.arrays["pieces"][row, (y // patch) * across + x // patch]
            assert np.array_equal(recombined[position, :, y, x], source.features[member, :, y, x])
    assert plan.arrays["pieces"].shape == (12, across * -(-shape[1] // patch))
    assert not np.array_equal(recombined, source.features[rows])


def test_contributors_are_the_members_of_a_row_each_once() -> None:
    source = rows_of(np.repeat([0, 1], 10))
    chain, (plan,) = planned("recombine:k=4", source)
    rows = np.array([13, 2, 5])
    positions, members, _ = chain.contributors(rows, [plan])
    wanted = [
        (position, member) for position, row in enumerate(rows) for member in sorted({*plan.arrays["pieces"][row]})
    ]
    assert list(zip(positions.tolist(), members.tolist(), strict=True)) == wanted
    assert len(wanted) > len(rows)
    assert [part.tolist() for part in Contributors.themselves(rows)[:2]] == [[0, 1, 2], [13, 2, 5]]


def test_a_class_with_fewer_than_k_rows_is_refused_by_name() -> None:
    source = rows_of([0] * 5 + [1] * 4 + [2] * 5)
    with pytest.raises(ConfigError, match=r"at least k = 5 rows of each class.*class 1: 4\b(?!.*0: 5)"):
        planned("recombine:k=5", source)
    assert len(groups_of(planned("recombine:k=4", source)[1][0])) == 3


@pytest.mark.parametrize("last", [nn.Linear(1, 2), nn.Conv2d(1, 2, 1)], ids=["linear", "no linear layer"])
def test_rows_that_the_classifier_sees_alike_are_grouped(last: nn.Module) -> None:
    cluster = np.random.default_rng(2).permutation(np.repeat(np.arange(8), 5))
    source = rows_of(cluster % 2)
    source.features[:, 0] = cluster[:, None, None] + 0.01 * source.features[:, 0]
    clusters = {frozenset(np.flatnonzero(cluster == number).tolist()) for number in range(8)}
    alike, not_seen = (
        {frozenset(group) for group in groups_of(planned("recombine:k=5", source, phi_2=phi_2)[1][0])}
        for phi_2 in (Pooled(0, last), Pooled(1, last))
    )
    assert alike == clusters
    assert len(not_seen & clusters) <= 1


def test_for_regression_the_quantiles_of_the_target_are_the_classes() -> None:
    targets = np.random.default_rng(3).permutation(np.arange(60, dtype=np.float32) ** 3)[:, None]
    source, ranks = rows_of(targets), targets[:, 0].argsort().argsort()
    spread = {}
    for bins in (1, 6):
        groups = groups_of(planned(f"recombine:bins={bins}", source)[1][0])
        spread[bins] = max(int(np.ptp(ranks[list(group)])) for group in groups)
    assert spread[6] < 10 < spread[1]


def test_two_regression_targets_make_joint_bins() -> None:
    targets = np.stack(np.meshgrid(np.arange(9.0), np.arange(9.0)), axis=-1).reshape(-1, 2).astype(np.float32)
    groups = groups_of(planned("recombine:k=4,bins=9", rows_of(targets))[1][0])
    assert all((np.ptp(targets[list(group)], axis=0) <= 2).all() for group in groups)
    assert any((np.ptp(targets[list(group)], axis=0) > 0).all() for group in groups)


def test_the_secret_alone_decides_the_plan() -> None:
    source = rows_of(np.repeat([0, 1], 12))
    plan, again, other = (planned("recombine:k=3", source, secret)[1][0] for secret in (SECRET, SECRET, OTHER_SECRET))
    assert np.array_equal(plan.arrays["pieces"], again.arrays["pieces"])
    assert not np.array_equal(plan.arrays["pieces"], other.arrays["pieces"])
    assert groups_of(plan) != groups_of(other)


# --------------------------------------------------------------------------------------------- chains


@pytest.fixture
def registry() -> Iterator[dict[str, type[PoisoningFunction]]]:
    """The registry, put back as it was."""
    before = dict(FUNCTIONS)
    yield FUNCTIONS
    FUNCTIONS.clear()
    FUNCTIONS.update(before)


def test_a_chain_applies_its_first_stage_first() -> None:
    source = rows_of(np.zeros(4))
    chain, plans = planned("gaussian-filter+dpf:depth=1", source)
    nn.init.ones_(chain.networks()[0][0].residual[-1].weight)
    everything = np.arange(4)
    blur, learned = chain.stages
    wanted, reversed_ = (
        PoisonedRows(PoisonedRows(source, first, plans[0]), second, plans[1]).read(everything)
        for first, second in ((blur, learned), (learned, blur))
    )
    assert np.array_equal(chain.on(source, plans).read(everything), wanted)
    assert np.array_equal(chain.on(source, plans, 1).read(everything), blur.apply(everything, source, plans[0]))
    assert np.array_equal(chain.on(source, plans, 0).read(everything), source.features)
    assert np.abs(wanted - reversed_).max() > 1e-3


@pytest.mark.usefixtures("registry")
def test_each_stage_plans_on_the_one_before_with_a_secret_of_its_own() -> None:
    register("recorder")(Recorder)
    source = rows_of(np.zeros(4))
    _, plans = planned("recorder+recorder+recorder", source)
    for stage, plan in enumerate(plans):
        assert np.array_equal(plan.arrays["shown"], source.features + np.float32(1) * stage)
    assert len({SECRET, *(plan.secret for plan in plans)}) == 4


@pytest.mark.parametrize("spec", ["dpf+gaussian-filter", "dpf+dpf", "mean-filter+dpf+identity"])
def test_a_learned_function_is_refused_but_at_the_end(spec: str) -> None:
    with pytest.raises(ConfigError, match="learned function last"):
        build_chain(spec, FeatureSpec((3, 8, 8), True))
    assert build_chain("mean-filter+identity+dpf", FeatureSpec((3, 8, 8), True)).networks()


@pytest.mark.parametrize("spec", ["recombine:k=3+recombine:k=3", "recombine:k=3,patch=1+mean-filter+recombine:k=2"])
def test_a_row_depends_on_its_contributors_through_all_stages_and_on_nothing_else(spec: str) -> None:
    source = rows_of(np.repeat([0, 1], 9))
    chain, plans = planned(spec, source)
    rows = np.array([10, 1])
    positions, members, _ = chain.contributors(rows, plans)
    assert len({*zip(positions, members, strict=True)}) == len(positions)
    before = chain.on(source, plans).read(rows)
    depends = set()
    for row in range(len(source)):
        features = source.features.copy()
        features[row] += 1
        after = chain.on(replace(source, features=features), plans).read(rows)
        depends |= {(position, row) for position in range(2) if not np.array_equal(after[position], before[position])}
    last = {*zip(*(part.tolist() for part in chain.stages[-1].contributors(rows, plans[-1])[:2]), strict=True)}
    assert depends <= {*zip(positions.tolist(), members.tolist(), strict=True)}
    assert not depends <= last  # what the last stage draws on is not enough


@pytest.mark.parametrize(
    ("spec", "mixing"),
    [("dpf", 0), ("recombine+dpf", 1), ("recombine+mean-filter+dpf", 1), ("mean-filter+recombine+dpf", 2)],
)
def test_mixing_stages_end_with_the_last_that_mixes(spec: str, mixing: int) -> None:
    assert build_chain(spec, FeatureSpec((3, 8, 8), True)).mixing_stages() == mixing


# --------------------------------------------------------------------------------------------- names


def test_parameters_are_read_from_the_name() -> None:
    features = FeatureSpec((3, 8, 8), True)
    (stage,) = build_chain("recombine:k=20,patch=3", features).stages
    assert (stage.k, stage.patch, stage.bins) == (20, 3, 10)
    assert build_chain("gaussian-noise:scale=0.5", features).stages[0].scale == 0.5
    assert build_chain("recombine", features).stages[0].k == 5


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("recombine:size=3", r"'k', 'patch', 'bins'.*'size'"),
        ("identity:k=3", "none.*'k'"),
        ("recombine:k=many", "number for recombine:k.*'many'"),
        ("recombine:k=2patch=2", "expected .*2patch=2"),
        ("recombine:k=1", "recombine:k from 2 to 10000, found 1"),
        ("recombine:patch=9", "recombine:patch from 1 to 8"),
        ("gaussian-noise:scale=nan", "gaussian-noise:scale from 0"),
        ("gaussian-noise:scale=-1", "gaussian-noise:scale from 0"),
        ("gaussian-filter:sigma=0", "gaussian-filter:sigma"),
        ("gaussian-filter:size=4", "size odd, from 1 to 15"),
        ("mean-filter:size=17", "size odd, from 1 to 15"),
        ("dpf:depth=0", "dpf:depth from 1"),
        ("recombine:20", r"as in 'recombine:k=20,patch=2', found 'recombine:20'"),
        ("recombine:k=", "as in 'recombine:k=20,patch=2'"),
        ("recombine:k=20,,patch=2", "as in 'recombine:k=20,patch=2'"),
        ("recombine:k=20,", "as in 'recombine:k=20,patch=2'"),
        ("mean-filter:size=2.5", "mean-filter:size"),
        ("recombine:k=2.5", "recombine:k"),
        ("dpf:depth=1.5", "dpf:depth"),
        ("blur", "gaussian-filter, .*or package.module.Class, found 'blur'"),
        ("dpf+", "found ''"),
        ("", "found ''"),
        ("no.such.Module", "'no.such.Module' cannot be imported"),
        ("..Blur", "'..Blur'"),
        ("collections.NoSuch", "'collections.NoSuch' cannot be imported"),
        ("collections.OrderedDict", "expected a poisoning function.*'collections.OrderedDict'"),
        ("math.sqrt", "expected a poisoning function.*'math.sqrt'"),
    ],
)
def test_a_name_that_says_nothing_is_refused_with_what_was_expected(spec: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        build_chain(spec, FeatureSpec((3, 8, 8), True))


def test_a_registered_class_is_known_by_its_name(registry: dict[str, type[PoisoningFunction]]) -> None:
    with pytest.raises(ConfigError, match="plus-one"):
        build_chain("plus-one", FeatureSpec((3, 4, 4), True))
    assert register("plus-one")(Recorder) is Recorder
    source = rows_of(np.zeros(2))
    assert np.array_equal(poisoned("plus-one", source), source.features + 1)
    assert "plus-one" in registry


def test_a_class_of_the_users_own_module_is_found_by_its_path(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owners_functions.py").write_text(
        "from dpf_release.core.parameters import Parameter\n"
        "from dpf_release.poisoning.interface import PoisoningFunction\n"
        "class Scaled(PoisoningFunction):\n"
        "    parameters = (Parameter('factor', 2.0, 0.0, 9.0, 'of each value'),)\n"
        "    def apply(self, rows, source, plan):\n"
        "        return source.read(rows) * self.factor\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    source = rows_of(np.zeros(2))
    assert np.array_equal(poisoned("owners_functions.Scaled:factor=3", source), source.features * 3)
    assert np.array_equal(poisoned("owners_functions:Scaled:factor=3", source), source.features * 3)
    assert np.array_equal(poisoned("owners_functions.Scaled", source), source.features * 2)
    assert np.array_equal(poisoned("owners_functions:Scaled", source), source.features * 2)
